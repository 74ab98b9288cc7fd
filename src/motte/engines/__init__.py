"""What runs graphs: one interface (``interface``), one file an engine.

``torch_engine`` is the exact reference. ``onnxruntime_engine`` and ``openvino_engine`` run the lowered form and load
neither torch nor anything that a worker does not need; what they share is in ``checks`` and ``numpy_arrays``.
"""
