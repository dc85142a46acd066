"""What data sets look like on disk."""
