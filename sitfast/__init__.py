"""sitfast: a fast training engine for Scalable Interpolant Transformers (SiT) and Diffusion Transformers (DiT)."""
