"""Any image or video is read exactly as it looks, or refused."""
