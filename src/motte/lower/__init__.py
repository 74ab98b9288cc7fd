"""Parts -> programs for engines that need no torch: ONNX without weights, made and checked on the owner's side."""
