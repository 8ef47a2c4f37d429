"""Where machines come from; one folder each."""
