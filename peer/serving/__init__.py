"""`hivegrpo serve`: an OpenAI-compatible endpoint in front of an engine process that holds the trained model."""
