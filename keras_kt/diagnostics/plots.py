"""Pictures of what `diagnostics` computes; they need matplotlib.

Each function makes a figure and returns it, without showing or saving it. Only
here is matplotlib imported, when a figure is made.
"""

from typing import Any

import keras
import numpy as np

from keras_kt import _checks
from keras_kt.conversion.errors import AttentionErrors
from keras_kt.diagnostics.matrices import AttentionMap
from keras_kt.diagnostics.profile import kernel_profile, spectrum

_STROKES = ("-", "--", ":", "-.")


def plot_kernels(layer: keras.Layer, before: Any = None) -> Any:
    """The kernel of each head against distance.

    Args:
        layer: a built `KernelizedAttention`.
        before: a `KernelProfile` to draw dotted beside it, such as that of the
            layer before training. Defaults to `None`.

    Returns:
        A matplotlib figure.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(2, 4)
        >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
        >>> figure = keras_kt.diagnostics.plots.plot_kernels(layer)
    """
    profile = kernel_profile(layer)
    figure, panel = _panel()
    for head, values in enumerate(profile.kernel):
        color = f"C{head}"
        panel.plot(profile.distances, values, color=color, label=f"head {head}")
        if before is not None:
            panel.plot(before.distances, before.kernel[head], ":", color=color)
    panel.axhline(0.0, color="0.8", zorder=0)
    panel.set_xlabel("|q − k|")
    panel.set_ylabel("E cos ω·(q − k)")
    title = f"Kernels of {layer.name}"
    panel.set_title(title if before is None else f"{title}; dotted: before")
    panel.legend(fontsize=8)
    return figure


def plot_spectrum(layer: keras.Layer, head: int = 0) -> Any:
    """The frequencies of one head in their two widest directions.

    Args:
        layer: a built `KernelizedAttention` with a `key_dim` of at least 2.
        head: number of the head.

    Returns:
        A matplotlib figure; areas are the frequencies' weights.

    Examples:
        >>> layer = keras_kt.KernelizedAttention(2, 4)
        >>> _ = layer(np.ones((1, 3, 5)), np.ones((1, 3, 5)))
        >>> figure = keras_kt.diagnostics.plots.plot_spectrum(layer, head=1)
    """
    found = spectrum(layer)
    head = _index("head", head, len(found.frequencies))
    omega, weights = found.frequencies[head], found.weights[head]
    if omega.shape[1] < 2:
        raise ValueError(
            "`layer` must have a key_dim of at least 2 for a plane of "
            f"frequencies. Received: key_dim={omega.shape[1]}"
        )
    # A frequency and its mirror image give the same kernel.
    _, _, axes = np.linalg.svd(omega * np.sqrt(weights)[:, None])
    x, y = (omega @ axes[:2].T).T
    figure, panel = _panel()
    panel.scatter(x, y, 2000.0 * weights, alpha=0.6)
    panel.axhline(0.0, color="0.8", zorder=0)
    panel.axvline(0.0, color="0.8", zorder=0)
    panel.set_aspect("equal")
    panel.set_xlabel("ω along its widest direction")
    panel.set_ylabel("ω along the second")
    panel.set_title(f"Frequencies of {layer.name}, head {head}")
    return figure


def plot_attention(
    attention_map: AttentionMap, head: int = 0, example: int = 0
) -> Any:
    """What a head attends to, beside softmax for the same queries and keys.

    Args:
        attention_map: one of `diagnostics.attention_maps`.
        head: number of the head.
        example: number of the example in the batch.

    Returns:
        A matplotlib figure. Shades are of the square root of the weights.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> model = keras.Model(x, keras_kt.KernelizedAttention(2, 4)(x, x))
        >>> x = np.ones((1, 5, 8))
        >>> maps = keras_kt.diagnostics.attention_maps(model, x)
        >>> figure = keras_kt.diagnostics.plots.plot_attention(maps[0], head=1)
    """
    batch, heads = attention_map.weights.shape[:2]
    head = _index("head", head, heads)
    example = _index("example", example, batch)
    pictures = {"kernel": attention_map.weights}
    if attention_map.softmax is not None:
        pictures["softmax"] = attention_map.softmax
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(
        1,
        len(pictures),
        figsize=(4.2 * len(pictures), 4.2),
        layout="constrained",
        squeeze=False,
    )
    chosen = [np.sqrt(x[example, head]) for x in pictures.values()]
    top = max(x.max() for x in chosen)
    for panel, name, picture in zip(panels[0], pictures, chosen, strict=True):
        image = panel.imshow(picture, vmin=0.0, vmax=top, cmap="viridis")
        panel.set_title(f"{attention_map.path}, head {head}: {name}", size=9)
        panel.set_xlabel("key")
        panel.set_ylabel("query")
    figure.colorbar(image, ax=panels[0], label="√weight", shrink=0.8)
    return figure


def plot_errors(errors: AttentionErrors) -> Any:
    """The errors of a converted model, head by head, beside uniform attention.

    Args:
        errors: `AttentionErrors`, from `attention_error` or `calibrate`.

    Returns:
        A matplotlib figure.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        >>> model, _ = keras_kt.convert_attention(keras.Model(x, y))
        >>> batch = np.random.normal(size=(1, 9, 8)).astype("float32")
        >>> errors = keras_kt.conversion.attention_error(model, batch)
        >>> figure = keras_kt.diagnostics.plots.plot_errors(errors)
    """
    figure, panel = _panel(width=max(4.0, 0.5 * len(errors.heads)))
    places = np.arange(len(errors.heads))
    panel.bar(places - 0.2, [h.matrix for h in errors.heads], 0.4)
    panel.bar(places + 0.2, [h.output for h in errors.heads], 0.4)
    panel.plot(places, [h.uniform for h in errors.heads], "k_", markersize=14)
    # Above the panel, where it hides no marker.
    figure.legend(
        ["uniform attention", "matrix", "output"],
        loc="outside upper center",
        ncols=3,
        fontsize=8,
    )
    panel.set_xticks(
        places,
        [f"{h.path} {h.head}" for h in errors.heads],
        rotation=90,
        size=7,
    )
    panel.set_ylabel("relative error against softmax")
    return figure


def plot_history(monitor: Any, path: str | None = None) -> Any:
    """How the kernels of one layer moved while it trained.

    Args:
        monitor: a `SpectralMonitor` that has watched a training.
        path: the layer's path, as in `monitor.history`. Defaults to `None`,
            which means the first.

    Returns:
        A matplotlib figure, a panel for each quantity of `monitor.history`;
        colors are heads, strokes are distances or a mixture's components.

    Examples:
        >>> x = keras.Input((None, 8))
        >>> model = keras.Model(x, keras_kt.KernelizedAttention(2, 4)(x, x))
        >>> model.compile("sgd", "mse")
        >>> batch = np.zeros((4, 6, 8))
        >>> monitor = keras_kt.diagnostics.SpectralMonitor(tempfile.mkdtemp())
        >>> _ = model.fit(batch, batch, callbacks=[monitor], verbose=0)
        >>> figure = keras_kt.diagnostics.plots.plot_history(monitor)
    """
    history = getattr(monitor, "history", None)
    # What `fit` returns has a history too, of losses.
    if not history or not hasattr(monitor, "distances"):
        raise ValueError(
            "`monitor` must be a SpectralMonitor that has watched at least one "
            f"epoch. Received: monitor={monitor!r}, which has no records of "
            "kernels. Give a monitor to `fit` as a callback first."
        )
    path = next(iter(history)) if path is None else path
    if path not in history:
        raise ValueError(
            f"`path` must be one of {sorted(history)}. Received: path={path!r}"
        )
    figure, panels = _pyplot().subplots(
        1,
        len(history[path]),
        figsize=(4.5 * len(history[path]), 3.6),
        layout="constrained",
        squeeze=False,
    )
    for panel, (name, records) in zip(
        panels[0], history[path].items(), strict=True
    ):
        _, heads, columns = np.shape(records)
        labels = [""] * columns
        if name == "kernel":
            labels = [f"|q − k| = {d:g}" for d in monitor.distances]
        elif name == "probability":
            labels = [f"component {i}" for i in range(columns)]
        for head in range(heads):
            for column, label in enumerate(labels):
                panel.plot(
                    monitor.epoch,
                    [record[head, column] for record in records],
                    color=f"C{head}",
                    linestyle=_STROKES[column % len(_STROKES)],
                    marker=".",
                    label=", ".join(filter(None, (f"head {head}", label))),
                )
        panel.set_title(f"{path}: {name}", size=9)
        panel.set_xlabel("epoch")
        panel.legend(fontsize=6, ncols=min(heads, 4))
    return figure


def _index(name, value, count):
    value = _checks.integer(name, value, minimum=None)
    if not 0 <= value < count:
        raise ValueError(
            f"`{name}` must be at least 0 and below {count}, the number of "
            f"{name}s. Received: {name}={value}"
        )
    return value


def _panel(width=5.5):
    figure, panel = _pyplot().subplots(
        figsize=(width, 4.0), layout="constrained"
    )
    return figure, panel


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Run `pip install "
            "matplotlib`."
        ) from error
    return pyplot
