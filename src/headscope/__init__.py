"""headscope finds and explains what the attention layers of language models compute."""
