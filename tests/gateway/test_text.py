"""Facts about text: what the model sees, and what the client reads."""

import asyncio
import random

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from adapters.demo.base_model import default_folder
from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from engine.model.text_bundle import export
from gateway.errors import InvalidRequest
from gateway.templates import TemplateFault, Templates
from gateway.text import Ending, TextCodec, TextCodecs
from tests.tokenizer_lab import KINDS, save_tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "What is a slot?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße, 日本, 🇩🇪 \n\n  and  spaces"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "<|im_end|> in the text"},
    ],
]


@pytest.fixture(scope="module")
def reference():
    return AutoTokenizer.from_pretrained(default_folder())


@pytest.fixture(scope="module")
def codec(reference) -> TextCodec:
    return TextCodec(_bundle(reference.chat_template))


def _bundle(chat_template: str | None) -> TextBundle:
    return TextBundle(
        tokenizer_json=(default_folder() / "tokenizer.json").read_bytes(),
        chat_template=chat_template,
        special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        eos_token_ids=(2,),
        generation_defaults={},
        context_length=8192,
        vocab_size=49152,
    )


@pytest.mark.parametrize("messages", CONVERSATIONS)
async def test_a_conversation_becomes_the_ids_that_transformers_makes_of_it(
    codec, reference, messages
):
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    assert await codec.encode_chat(messages) == list(expected)


@pytest.mark.parametrize("template", [None, "trimming"])
@pytest.mark.parametrize("said", ["Hello", "Hello, ", " a \n\n", "<|im_end|> in the text"])
async def test_a_message_is_continued_where_transformers_continues_it(reference, template, said):
    source = reference.chat_template
    if template:
        source = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} \n{% endfor %}"
    messages = [*CONVERSATIONS[0], {"role": "assistant", "content": said}]
    expected = reference.apply_chat_template(
        messages,
        chat_template=source,
        continue_final_message=True,
        return_dict=False,
        tokenize=True,
    )
    codec = TextCodec(_bundle(source))
    assert await codec.encode_chat(messages, ending=Ending.CONTINUING) == list(expected)


async def test_a_template_that_hides_the_last_message_cannot_continue_it():
    codec = TextCodec(_bundle("{{ messages[0].content }}"))
    messages = [*CONVERSATIONS[0], {"role": "assistant", "content": "Hello"}]
    with pytest.raises(TemplateFault, match="continued"):
        await codec.encode_chat(messages, ending=Ending.CONTINUING)


async def test_a_template_is_told_variables_but_none_of_our_own(codec):
    told = TextCodec(_bundle("{{ mood }}{{ messages[0].content }}"))
    [message] = CONVERSATIONS[0]
    expected = await codec.encode_text("good" + message["content"])
    assert await told.encode_chat([message], variables={"mood": "good"}) == expected
    for name in ("messages", "add_generation_prompt", "tools", "bos_token"):
        with pytest.raises(InvalidRequest, match=name):
            await told.encode_chat([message], variables={name: "x"})


async def test_a_bare_prompt_becomes_the_ids_that_transformers_makes_of_it(codec, reference):
    assert await codec.encode_text("once upon a time") == reference("once upon a time").input_ids


async def test_a_long_prompt_is_encoded_like_a_short_one(codec, reference):
    text = "all work and no play " * 2000
    assert await codec.encode_text(text) == reference(text).input_ids


async def test_a_model_without_a_template_says_where_to_go():
    with pytest.raises(TemplateFault, match="/v1/completions"):
        await TextCodec(_bundle(None)).encode_chat(CONVERSATIONS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{% set _ = messages.append({}) %}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
async def test_a_template_reaches_nothing_but_its_messages(template):
    with pytest.raises(TemplateFault):
        await TextCodec(_bundle(template)).encode_chat(CONVERSATIONS[0])


OWN_TEMPLATE = """{{ bos_token }}{%- for m in messages %}
{% generation %}
[{{ m.role | upper }}] {{ m.content | trim }}{{ eos_token }}
{% endgeneration %}
{%- if loop.index > 8 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<sql>{% endif %}"""


@pytest.fixture
async def templates():
    templates = Templates()
    yield templates
    await templates.close()


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    """A tokenizer as a trainer leaves it beside an adapter: own tokens, end and template."""
    tokenizer = AutoTokenizer.from_pretrained(default_folder())
    tokenizer.add_tokens(["<sql>", "</sql>"])
    tokenizer.add_special_tokens({"eos_token": "<|done|>"})
    tokenizer.chat_template = OWN_TEMPLATE
    folder = tmp_path_factory.mktemp("own")
    tokenizer.save_pretrained(folder)
    return folder


async def test_an_adapters_own_text_files_mean_what_they_mean_to_transformers(
    templates, reference, own_folder
):
    files = {path.name: path for path in own_folder.iterdir()}
    base = _bundle(reference.chat_template)
    bundle, findings = await templates.build(files, base, num_added_tokens=3)
    assert findings == []
    codec, expected = (
        TextCodec(bundle, templates=templates),
        AutoTokenizer.from_pretrained(own_folder),
    )
    for messages in CONVERSATIONS:
        ids = expected.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, tokenize=True
        )
        assert await codec.encode_chat(messages, caller="acme") == list(ids)
        assert ids[-1] == 49152
    text = "SELECT <sql> 1 </sql><|done|>"
    assert await codec.encode_text(text) == expected(text).input_ids
    assert codec.decode([49152, 504, 49153, 49154]) == "<sql>The</sql>"
    assert (codec.eos_token_ids, codec.vocab_size) == ((2, 49154), 49155)


async def test_files_that_a_trainer_copied_from_the_base_model_make_no_bundle(
    templates, reference, tmp_path
):
    reference.save_pretrained(tmp_path)
    files = {path.name: path for path in tmp_path.iterdir()}
    base = _bundle(reference.chat_template)
    assert await templates.build(files, base, num_added_tokens=0) == (None, [])


async def test_only_the_base_models_own_template_is_rendered_in_this_process(templates):
    store = ArtifactStore("memory://")
    texts = TextCodecs(store, templates=templates)
    power = await store.put_bundle(_bundle("{{ 9 ** (9 ** 9) }}"))
    plain = await store.put_bundle(_bundle("{{ messages[0].content }}"))
    codec = await texts.get(power, base=plain)
    with pytest.raises(TemplateFault, match="stopped"):
        await codec.encode_chat(CONVERSATIONS[0], caller="acme")
    ours = await texts.get(plain, base=plain)
    theirs = await texts.get(plain, base=power)
    assert ours is not theirs
    assert await ours.encode_chat(CONVERSATIONS[0]) == await theirs.encode_chat(CONVERSATIONS[0])


async def test_a_long_prompt_leaves_the_interpreter_to_others(codec):
    text = "all work and no play " * 50_000
    encoding = asyncio.create_task(codec.encode_text(text))
    turns = 0
    while not encoding.done():
        turns += 1
        await asyncio.sleep(0)
    # Where the lock is kept there are two or three.
    assert turns > 100


async def test_a_text_that_the_tokenizer_cannot_take_is_the_clients_fault(codec):
    with pytest.raises(InvalidRequest):
        await codec.encode_text("\ud800")


def _streamed(codec: TextCodec, token_ids: list[int], *stops: str) -> tuple[str, list[str]]:
    stream, pieces = codec.stream(stops), []
    for token_id in token_ids:
        pieces.append(stream.feed(token_id))
        if stream.is_stopped:
            break
    pieces.append(stream.finish())
    return "".join(pieces), pieces


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_tokens_add_up_to_the_whole_text(codec, seed):
    rng = random.Random(seed)
    token_ids = [rng.randrange(49152) for _ in range(200)]
    text, _ = _streamed(codec, token_ids)
    assert text == codec.decode(token_ids)


def test_special_tokens_are_shown_where_they_are_asked_for(codec, reference):
    token_ids = reference("<|im_start|>one<|im_end|> two<|im_end|>").input_ids
    stream = codec.stream(shows_special_tokens=True)
    pieces = [stream.feed(token_id) for token_id in token_ids]
    text = "".join([*pieces, stream.finish()])
    assert text == "<|im_start|>one<|im_end|> two<|im_end|>"
    assert _streamed(codec, token_ids)[0] == "one two"


@pytest.mark.parametrize("family", KINDS)
def test_pieces_add_up_whatever_the_tokenizer_is_made_of(family, tmp_path):
    save_tokenizer(KINDS[family], tmp_path)
    codec = TextCodec(export(str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text, pieces = _streamed(codec, tokenizer.encode("naïve 日本 🦜 ok"))
    assert text == "naïve 日本 🦜 ok"
    assert not any("\ufffd" in piece for piece in pieces)
    of_bird = tokenizer.encode("🦜", add_special_tokens=False)
    told = b"".join(bytes(codec.token_bytes(each)) for each in of_bird)
    assert told.endswith("🦜".encode())
    for seed in range(50):
        rng = random.Random(seed)
        token_ids = [rng.randrange(codec.vocab_size) for _ in range(60)]
        text, _ = _streamed(codec, token_ids)
        whole = codec.decode(token_ids)
        # A letter that was shown before the byte that broke it stays.
        assert text == whole or KINDS[family].has_byte_fallback
        assert text.rpartition("\ufffd")[2] == whole.rpartition("\ufffd")[2]


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("start", ["The quick", "a 🦜"])
def test_an_answer_that_continues_a_text_keeps_its_first_space(family, start, tmp_path):
    save_tokenizer(KINDS[family], tmp_path)
    codec = TextCodec(export(str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.encode(start)
    unknown = 2**62
    answer = tokenizer.encode(f"{start} again and again")[len(prompt) :]
    stream = codec.stream(after=[unknown, *prompt])
    pieces = [stream.feed(token_id) for token_id in answer]
    assert "".join([*pieces, stream.finish()]) == " again and again"
    assert "".join(map(codec.token_text, answer)) == " again and again"


def test_every_piece_holds_whole_characters(codec, reference):
    text, pieces = _streamed(codec, reference("日本語 👨‍👩‍👧 🇩🇪 ok").input_ids)
    assert text == "日本語 👨‍👩‍👧 🇩🇪 ok"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_broken_character_at_the_end_is_shown_as_such(codec, reference):
    token_ids = reference("👨").input_ids[:-1]
    assert _streamed(codec, token_ids)[0] == "\ufffd"


@pytest.mark.parametrize("stop", ["three", "one two", " two thr", "e f", "four", "onetwo"])
def test_nothing_of_a_stop_string_is_ever_shown(codec, reference, stop):
    text = "one two three four"
    shown, _ = _streamed(codec, reference(text).input_ids, stop, "never there")
    assert shown == (text[: text.index(stop)] if stop in text else text)


def test_the_first_of_several_stops_wins(codec, reference):
    shown, _ = _streamed(codec, reference("one two three").input_ids, "three", "two")
    assert shown == "one "


def test_text_held_back_for_a_stop_that_never_comes_is_shown_at_the_end(codec, reference):
    shown, _ = _streamed(codec, reference("one two thr").input_ids, "three")
    assert shown == "one two thr"


def test_the_bytes_of_half_a_character_are_told(codec, reference):
    token_ids = reference("👨").input_ids
    assert b"".join(bytes(codec.token_bytes(each)) for each in token_ids) == "👨".encode()


def test_every_single_token_has_bytes(codec):
    tokenizer = Tokenizer.from_buffer(_bundle(None).tokenizer_json)
    whole = [each for each in range(2000) if "\ufffd" not in codec.token_text(each)]
    assert all(bytes(codec.token_bytes(each)).decode() == codec.token_text(each) for each in whole)
    assert tokenizer.get_vocab_size() == 49152
