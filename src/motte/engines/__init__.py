"""What runs graphs: one interface (``interface``), one file an engine (``torch_engine``)."""
