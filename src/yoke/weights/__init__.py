"""Model files in and out: GGUF reading, conversion from Hugging Face directories, quantisation, tokenizers. Knows no machine, plan or network."""
