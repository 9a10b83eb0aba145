"""SavedModels for TensorFlow Serving: `export_saved_model`.

Endpoints with named tensors, streaming ones whose state travels with the
request, numbered versions, and requests that warm a server up.
"""

from keras_kt.serving.export import export_saved_model

__all__ = ["export_saved_model"]
