"""The HTTP server: OpenAI's shapes over one worker process a device, and the web page."""
