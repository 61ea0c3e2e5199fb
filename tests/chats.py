"""Chat templates of the kinds that are in use, written for tests, and a tokenizer that has one."""

from transformers import AutoTokenizer

from tests.conftest import DEMO_MODEL

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nAnswer well.<|im_end|>\n' }}{% endif %}" + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|body|>\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\n\n' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, beginning with user') }}{% endif %}{% endfor %}" + CHATML
)
NO_PROMPT = CHATML.removesuffix(PROMPT)
OPEN_ENDED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHOUTING = CHATML.replace("m.content", "m.content | upper")

VOCABULARY = 2056
END = "<|im_end|>"


def chat_tokenizer(template=CHATML):
    """That of the demo model, with ids below ``VOCABULARY``; a text begins with no token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|begin|>",
            "eos_token": END,
            "additional_special_tokens": ["<|im_start|>", "<|head|>", "<|body|>"],
        }
    )
    assert len(tokenizer) <= VOCABULARY
    tokenizer.chat_template = template
    return tokenizer
