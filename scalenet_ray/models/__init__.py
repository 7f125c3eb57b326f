"""The networks: everything that knows torch or onnxruntime, and nothing that knows Ray."""
