"""The language model, the speech LLM around it, and how it is spread over devices."""
