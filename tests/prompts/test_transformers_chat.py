"""A chat model that runs here: a random Llama of a few kilobytes, with a tokenizer of bytes."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.prompts.stubs import Remembering
from wan22.prompts import ChatError, Message, TransformersChat, extend_prompt

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if loud %}LOUD{% endif %}"
)
ASKED = [Message("system", "be short"), Message("user", "a fox")]


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({char: i for i, char in enumerate(["</s>", *alphabet])}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture
def model():
    """Return a model that ends its answer where it must."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, eos_token_id=0, pad_token_id=0, bos_token_id=None, **sizes)
    )
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # seldom the end by chance
        for special in (10, 13, 32):
            model.lm_head.weight[special] = 0
    model.generation_config.forced_eos_token_id = 0
    return model.eval()


class Spy:
    """Stands before a tokenizer and keeps what its template was given."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.decode = tokenizer.decode

    def apply_chat_template(self, conversation, **options):
        self.conversation = conversation
        inputs = self.tokenizer.apply_chat_template(conversation, **options)
        self.text = self.tokenizer.decode(inputs["input_ids"][0])
        return inputs


def test_the_template_is_used(model, tokenizer):
    spy = Spy(tokenizer)
    TransformersChat(model, spy, max_new_tokens=4)(ASKED)
    assert spy.text == "<system>be short</s><user>a fox</s><assistant>"
    TransformersChat(model, spy, max_new_tokens=4, template_options={"loud": True})(ASKED)
    assert spy.text.endswith("<assistant>LOUD")


def test_the_answer_is_what_follows_the_question(model, tokenizer):
    """Against the model's own logits, one token at a time."""
    answer = TransformersChat(model, tokenizer, max_new_tokens=6)(ASKED)
    text = "<system>be short</s><user>a fox</s><assistant>"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert answer == tokenizer.decode(ids[0, -5:], skip_special_tokens=True)
    assert answer


def test_seeds(model, tokenizer):
    chat = TransformersChat(model, tokenizer, max_new_tokens=12)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = chat(ASKED, seed=1), chat(ASKED, seed=1), chat(ASKED, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert len({first, other, chat(ASKED)}) == 3
    assert chat(ASKED) == chat(ASKED)


def test_a_checkpoints_sampling_does_not_count(model, tokenizer, monkeypatch):
    """Without a seed the answer is the likeliest, whatever the checkpoint's settings; and no warning."""
    generate, given = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **o: (given.append(o), generate(**o))[1])
    plain = TransformersChat(model, tokenizer, max_new_tokens=12)(ASKED)
    model.generation_config.update(temperature=5.0, top_p=0.5, do_sample=True)
    assert TransformersChat(model, tokenizer, max_new_tokens=12)(ASKED) == plain
    assert all(given[-1][name] is None for name in ("temperature", "top_p", "top_k"))


def test_an_answer_that_was_cut_off(model, tokenizer):
    model.generation_config.forced_eos_token_id = None
    chat = TransformersChat(model, tokenizer, max_new_tokens=7)
    message = "LlamaForCausalLM was cut off after 7 tokens: '.*'; max_new_tokens=14 lets it write more"
    with pytest.raises(ChatError, match=message):
        chat(ASKED)
    model.generation_config.eos_token_id = [0, 5]
    model.generation_config.forced_eos_token_id = 5
    assert isinstance(chat(ASKED), str)


def test_an_extension_end_to_end(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("x")] = 1  # the only token that is likely
    chat = TransformersChat(model, tokenizer, max_new_tokens=9)
    assert extend_prompt("a fox", chat) == "x" * 8


def test_from_a_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        chat = TransformersChat(name, max_new_tokens=6, device="cpu")
        assert chat(ASKED) == TransformersChat(model, tokenizer, max_new_tokens=6)(ASKED)
        assert chat.name == str(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert TransformersChat(tmp_path, device="cpu").model.dtype == torch.bfloat16, "as it is stored"


def test_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer=None must be given .* \(LlamaForCausalLM\)"):
        TransformersChat(model)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no chat template; give a chat model, such as"):
        TransformersChat(model, bare)
    bare.save_pretrained(tmp_path)  # and no weights: it is found out before they are loaded
    with pytest.raises(ValueError, match="has no chat template"):
        TransformersChat(tmp_path)
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="LlamaForCausalLM sees no images; give a model that does"):
        extend_prompt("a fox", TransformersChat(model, tokenizer), image=image)


def test_a_processor_is_given_the_images(model, tokenizer):
    class Processor(Spy):
        image_processor = "there is one"

        def apply_chat_template(self, conversation, **options):
            self.conversation = conversation
            return BatchEncoding({"input_ids": torch.tensor([[40, 41]])})

    processor = Processor(tokenizer)
    image = Image.new("RGB", (8, 8), "red")
    TransformersChat(model, processor, max_new_tokens=6)([ASKED[0], Message("user", "a fox", (image,))])
    assert processor.conversation == [
        {"role": "system", "content": [{"type": "text", "text": "be short"}]},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a fox"}]},
    ]


def test_the_stub_is_a_chat_model(model, tokenizer):
    """What the other tests use in its place answers the same calls."""
    for chat in (Remembering(), TransformersChat(model, tokenizer, max_new_tokens=4)):
        assert isinstance(chat(ASKED), str)
        assert isinstance(chat(ASKED, seed=1), str)
