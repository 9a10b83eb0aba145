"""How pictures show a method: one color for each, in every picture.

The color is the prior's, or softmax's; dashes are the feature map's, or of dots
where the layer has options. Colors are those of Okabe and Ito, and marks differ
too, so that nothing hangs on the color alone. Pictures are drawn 9 inches wide
and shown 700 pixels wide: text of 9 points is 10 pixels high then.
"""

WIDTH = 9.0
RESOLUTION = 160
SOFTMAX = "#000000"
FIXED = "#8A8A8A"
NORMAL = "#0072B2"
# What is no attention that layers could have: bounds, other packages.
OTHERS = ("#7B5B3A", "#B8A038")
# Color and mark of each prior; fixed laws are one, Performer's among them.
METHODS = {
    "softmax": (SOFTMAX, "x"),
    "fixed": (FIXED, "o"),
    "normal": (NORMAL, "s"),
    "mixture": ("#009E73", "^"),
    "fastfood": ("#56B4E9", "v"),
    "generator": ("#D55E00", "D"),
    "empirical": ("#CC79A7", "P"),
    "rbf": ("#E69F00", "h"),
    "gmm": ("#882255", "<"),
}
# Systems of the paper have the color of their prior. GMM is as released one
# Gaussian a head with a mean, so neither "normal" nor "mixture".
SYSTEMS = {
    "GMM": "gmm",
    "FastFood": "fastfood",
    "Generator": "generator",
    "Performer": "fixed",
    "RBF": "rbf",
}
DASHES = {"RKS": "--", "trigonometric": "--", "self": "-."}
TEXT = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def pyplot():
    """matplotlib's module, set up to write files.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(TEXT)
    return pyplot


def save(figure, path):
    figure.savefig(path, dpi=RESOLUTION)
    print(f"Picture: {path}")


def of(attention):
    """Color, mark and dashes of an attention, as arguments of `plot`.

    Args:
        attention: as records or their labels name it: `softmax`,
            `PRIOR:MAP`, `PRIOR-MAP`, a system of the paper, or one of these
            with flags.
    """
    words = attention.removeprefix("mended").replace(":", "-").split("-")
    words = [word for part in words for word in part.split()]
    first, *rest = filter(None, words)
    color, mark = METHODS[SYSTEMS.get(first, first)]
    # Of the default map, with flags.
    plain = "-" if {*rest} <= {"PRF", "positive"} else ":"
    dashes = next((DASHES[word] for word in rest if word in DASHES), plain)
    return {"color": color, "marker": mark, "linestyle": dashes}
