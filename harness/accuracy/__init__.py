"""How right the tokens are: perplexity and lm-evaluation-harness tasks over the engines' own passes."""
