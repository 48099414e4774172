"""Where text enters a denoiser."""
