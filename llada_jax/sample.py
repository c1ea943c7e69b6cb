"""The former place of `read_prompts`, kept for scripts that import it from here; new code imports
llada_jax.verbs.sample.
"""

from llada_jax.verbs.sample import read_prompts as read_prompts
