"""Every documented model that masks its padding does not see it."""

import doctest
import inspect
import re

import keras
import numpy as np
import pytest

from tests.helpers.pages import GLOBALS, PAGES, ROOT, documented
from tests.helpers.scripts import arguments, example, script

PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Not a lone layer that is called with tokens.
MASKED_MODEL = re.compile(r"keras\.Input.*mask_zero", re.DOTALL)


@pytest.fixture
def built(monkeypatch):
    """The functional models that are made while a test runs."""
    models = []
    initialize = keras.Model.__init__

    def remember(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        models.append(self)

    monkeypatch.setattr(keras.Model, "__init__", remember)
    return models


def masks_padding(model):
    """Whether it is of tokens, some of which are padding by their number."""
    return (
        len(model.__dict__.get("_inputs", ())) == 1
        and len(model.inputs[0].shape) == 2
        and any(
            isinstance(layer, keras.layers.Embedding) and layer.mask_zero
            for layer in model._flatten_layers()
        )
    )


def louder(model):
    rng = np.random.default_rng(3)
    for weight in model.trainable_weights:
        noise = 0.3 * rng.normal(size=weight.shape)
        weight.assign(weight + noise.astype("float32"))


def assert_padding_is_not_seen(model, longer, count=5, padding=45):
    """`longer` is the same model, of a length that takes the padding."""
    tokens = np.arange(1, count + 1)[np.newaxis] % 4 + 1
    padded = np.pad(tokens, ((0, 0), (0, padding)))
    for one, other in zip(
        keras.tree.flatten(model.predict(tokens, verbose=0)),
        keras.tree.flatten(longer.predict(padded, verbose=0)),
        strict=True,
    ):
        if one.ndim > 2:
            other = other[:, : one.shape[1]]
        np.testing.assert_allclose(one, other, rtol=0.0, atol=1e-4)


def check(models):
    masked = [model for model in models if masks_padding(model)]
    for model in masked:
        louder(model)
        assert_padding_is_not_seen(model, model)
    return len(masked)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_models_of_pages(page, built, tmp_path, monkeypatch):
    """The first model of README.md lost the mask in a sum before pooling."""
    blocks = PYTHON.findall(page.read_text())
    if not any(MASKED_MODEL.search(block) for block in blocks):
        pytest.skip("no model that masks")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(block, namespace)  # noqa: S102
    assert check(built)


@pytest.mark.slow
@pytest.mark.parametrize("value", list(documented()))
def test_models_of_docstrings(value, built):
    text = inspect.getdoc(value) or ""
    example = doctest.DocTestParser().get_doctest(
        text, dict(GLOBALS), "example", None, 0
    )
    if not any("mask_zero" in line.source for line in example.examples):
        pytest.skip("no model that masks")
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert check(built)


def sentences(task, args):
    encoder = script("pretraining").build_encoder(9, args)
    return task.build_classifier(encoder, args)


# How an experiment's model is made.
BUILDERS = {
    "retrieval": lambda task, args: task.build_tower(args),
    "dna": lambda task, args: task.build_model(args),
    "listops": lambda task, args: task.build_model(args),
    "glue": sentences,
    "text": lambda task, args: task.build_model(args),
}


def masking(folder):
    return {
        path.stem
        for path in (ROOT / folder).glob("*.py")
        if "mask_zero" in path.read_text()
    }


def test_every_script_that_masks_is_covered():
    # The encoder of `glue` is made by `pretraining`.
    others = {"convert_tasks", "pretraining"}
    assert masking("experiments") == {*BUILDERS, *others} - {"glue"}
    assert masking("examples") == {"convert_pretrained", "text_classification"}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["normal:positive", "softmax"])
@pytest.mark.parametrize("name", BUILDERS)
def test_models_of_experiments(name, attention, tmp_path):
    """The same weights at two lengths, of which positions are cut."""
    task = script(name)
    sizes = {"width": 8, "heads": 2, "key_dim": 4, "hidden": 8, "blocks": 2}
    stride = getattr(task.PRESETS["cpu"], "stride", 1)
    lengths = 4 * stride, 16 * stride
    models = []
    for length in lengths:
        args = arguments(name, tmp_path, length=length, **sizes)
        vars(args).update(attention=attention, mutations=0.0, shift=0)
        args.classes = 2
        models.append(BUILDERS[name](task, args))
    short, long = models
    louder(long)
    for weight, whole in zip(short.weights, long.weights, strict=True):
        weight.assign(whole[tuple(slice(n) for n in weight.shape)])
    count, padding = lengths[0], lengths[1] - lengths[0]
    assert_padding_is_not_seen(short, long, count, padding)


@pytest.mark.slow
def test_models_of_the_conversion(built):
    """They are of any length."""
    script("convert_tasks").Classifier.build()
    example("convert_pretrained").build_model()
    assert check(built) == 2


@pytest.mark.slow
def test_model_of_the_example_on_texts():
    """It is of a fixed length, but has no positions."""
    build_model = example("text_classification").build_model
    short, long = build_model(5), build_model(50)
    louder(long)
    short.set_weights(long.get_weights())
    assert_padding_is_not_seen(short, long)
