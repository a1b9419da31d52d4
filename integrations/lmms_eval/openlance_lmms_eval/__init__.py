"""openlance as a plugin of lmms-eval."""
