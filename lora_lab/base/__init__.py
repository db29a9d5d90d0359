"""The frozen base model: find it, trust it, load and quantize it, and know it again later."""
