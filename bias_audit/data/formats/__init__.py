"""The annotation formats of other tools, one module for each; `known` lists them."""
