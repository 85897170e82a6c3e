"""SiT-XL/2 and DiT-XL/2 from their published checkpoints, and the image file that ADM's evaluator reads."""
