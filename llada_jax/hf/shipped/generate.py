"""`model.generate(..., custom_generate=THIS_REPOSITORY, trust_remote_code=True)` of transformers 5:
transformers calls the function `generate` of custom_generate/generate.py.
"""


def generate(model, inputs=None, *, input_ids=None, max_new_tokens=None, **settings):
    """Generates by masked diffusion; takes what `model.generate_diffusion` takes.

    Args:
        inputs, input_ids: [B, P] prompts, under either name.
        max_new_tokens: what transformers calls gen_length.

    Returns:
        [B, P + gen_length]: prompts and generations.

    Raises:
        ValueError: the prompts or the length are given twice or not at all.
        TypeError: a setting that only autoregressive generation has.
    """
    prompts = [given for given in (inputs, input_ids) if given is not None]
    if len(prompts) != 1:
        raise ValueError("Give the prompts once, as inputs or as input_ids.")
    if max_new_tokens is not None:
        if "gen_length" in settings:
            raise ValueError("max_new_tokens and gen_length are the same; give one of them.")
        settings["gen_length"] = max_new_tokens
    # transformers hands in all arguments of its own `generate`, most of them None
    settings = {name: value for name, value in settings.items() if value is not None}
    return model.generate_diffusion(prompts[0], **settings)
