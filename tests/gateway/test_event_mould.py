"""Events that are cast instead of encoded say the same."""

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.api.chat import ChatChunkChoice, ChatCompletionChunk, ChatDelta
from gateway.api.sse import EventMould, event


# JSON has no lone surrogates, and no tokenizer makes one.
@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(0, 128),
)
@example('"content":"", \\"choices":[', '"content":""', 0)
def test_a_chunk_of_text_is_cast_as_it_would_be_encoded(model: str, said: str, index: int) -> None:
    bare = ChatCompletionChunk(id="chatcmpl-1", created=1, model=model, choices=[])
    empty = ChatChunkChoice(ChatDelta(content=""), index=index)
    mould = EventMould(bare).of_text(empty, field="content")
    choice = ChatChunkChoice(ChatDelta(content=said), index=index)
    assert mould.cast(said) == event(msgspec.structs.replace(bare, choices=[choice]))
