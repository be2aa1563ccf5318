"""The link between a gateway worker and an engine, over real sockets that break."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.client import EngineLink, MergedStreams
from engine.errors import EngineLost, EngineRefused, EngineUnreachable, SlowConsumer
from engine.protocol import Abort, Frame, SequenceState
from engine.sessions import LinkLimits
from tests.engine.echo_engine import (
    INFO,
    Engine,
    Wire,
    collect,
    engine,
    greedy,
    link,
    short_folder,
    tokens_of,
    until,
    wire_between,
)


@pytest.fixture
async def folder() -> AsyncIterator[Path]:
    async with short_folder() as path:
        yield path


@pytest.fixture
async def echo(folder: Path) -> AsyncIterator[Engine]:
    async with engine(folder / "engine.sock") as served:
        yield served


@pytest.fixture
async def wire(folder: Path, echo: Engine) -> AsyncIterator[Wire]:
    async with wire_between(folder / "wire.sock", echo.path) as made:
        yield made


def numbers(frames: list[Frame]) -> list[int]:
    return [frame.number for frame in frames]


async def test_tokens_come_back_in_order_with_counters(echo: Engine) -> None:
    async with link(echo.address) as worker:
        events = await collect(worker.submit([5, 6, 7], sampling=greedy(4)))
    assert tokens_of(events) == [5, 6, 7, 5]
    assert [event.generated_tokens for event in events] == [1, 2, 3, 4]
    assert {event.prompt_tokens for event in events} == {3}
    assert [event.state for event in events][-1] is SequenceState.LENGTH


async def test_each_frame_is_journalled_once_and_before_its_events_are_seen(echo: Engine) -> None:
    frames: list[Frame] = []
    async with link(echo.address, on_frame=frames.append) as worker:
        async for event in worker.submit([1, 2], sampling=greedy(50)):
            journalled = [e for frame in frames for e in frame.events]
            assert event in journalled
    assert numbers(frames) == list(range(1, len(frames) + 1))
    assert {frame.engine_epoch for frame in frames} == {INFO.engine_epoch}


async def test_all_commands_of_a_tick_leave_in_one_post(echo: Engine) -> None:
    echo.core.allow_steps(0)
    async with link(echo.address) as worker:
        posts: list[int] = []
        send = worker._send_batch

        async def counted() -> bool:
            posts.append(len(worker._outgoing))
            return await send()

        worker._send_batch = counted  # type: ignore[method-assign]  # watched, not replaced
        streams = [worker.submit([n], sampling=greedy(1)) for n in range(1, 21)]
        await until(lambda: len(echo.core.running) == 20)
        assert posts == [20]
        echo.core.allow_steps(None)
        assert [tokens_of(await collect(s)) for s in streams] == [[n] for n in range(1, 21)]


async def test_a_step_makes_one_frame_for_all_sequences_of_a_worker(echo: Engine) -> None:
    frames: list[Frame] = []
    echo.core.allow_steps(0)
    async with link(echo.address, on_frame=frames.append) as worker:
        streams = [worker.submit([n], sampling=greedy(3)) for n in range(1, 9)]
        await until(lambda: len(echo.core.running) == 8)
        for num_steps in (1, 2, 3):
            echo.core.allow_steps(1)
            await until(lambda: len(frames) == num_steps)  # noqa: B023  awaited within the turn
        for stream in streams:
            await collect(stream)
    assert [len(frame.events) for frame in frames] == [8, 8, 8]


async def test_steps_that_outrun_the_loop_share_a_frame_and_every_event_is_told(
    echo: Engine,
) -> None:
    frames: list[Frame] = []
    async with link(echo.address, on_frame=frames.append) as worker:
        await collect(worker.submit([1], sampling=greedy(5_000)))
    counts = [event.generated_tokens for frame in frames for event in frame.events]
    assert counts == list(range(1, 5_001))
    assert len(frames) < 5_000


async def test_two_workers_get_their_own_sequences_alone(echo: Engine) -> None:
    async with link(echo.address, worker_id="a") as a, link(echo.address, worker_id="b") as b:
        streams = [
            (prompt, worker.submit([prompt], sampling=greedy(30)))
            for prompt, worker in ((1, a), (2, b), (3, a), (4, b))
        ]
        for prompt, stream in streams:
            assert tokens_of(await collect(stream)) == [prompt] * 30


async def test_an_abort_ends_a_sequence_with_a_final_event(echo: Engine) -> None:
    async with link(echo.address) as worker:
        stream = worker.submit([1], sampling=greedy(10**6))
        await anext(stream)
        stream.abort()
        events = await collect(stream)
        assert events[-1].state is SequenceState.ABORTED
        await until(lambda: not echo.core.running)


async def test_what_the_core_refuses_is_a_failed_event_of_that_sequence_alone(echo: Engine) -> None:
    async with link(echo.address) as worker:
        bad, good = (
            worker.submit([], sampling=greedy(2)),
            worker.submit([9], sampling=greedy(2)),
        )
        (failed,) = await collect(bad)
        assert failed.state is SequenceState.FAILED
        assert failed.fault is not None
        assert (failed.fault.code, failed.fault.is_retryable) == ("invalid_sequence", False)
        assert tokens_of(await collect(good)) == [9, 9]


async def test_a_broken_connection_is_resumed_without_loss_or_repeats(
    echo: Engine, wire: Wire
) -> None:
    frames: list[Frame] = []
    async with link(wire.address, on_frame=frames.append) as worker:
        stream = worker.submit([1, 2, 3], sampling=greedy(20_000))
        events = []
        for _ in range(5):
            for _ in range(500):
                events.append(await anext(stream))
            wire.drop_connections()
        events += await collect(stream)
    assert tokens_of(events) == ([1, 2, 3] * 20_000)[:20_000]
    assert numbers(frames) == list(range(1, len(frames) + 1))
    assert len(echo.core.seen) == 1


async def test_commands_queued_while_the_link_is_down_arrive_once_when_it_is_back(
    echo: Engine, wire: Wire
) -> None:
    async with link(wire.address) as worker:
        wire.cut()
        await until(lambda: not worker.is_connected)
        streams = [worker.submit([n], sampling=greedy(2)) for n in (1, 2, 3)]
        wire.mend()
        assert [tokens_of(await collect(s)) for s in streams] == [[1, 1], [2, 2], [3, 3]]
    assert [key[2] for key in echo.core.seen] == [1, 2, 3]


async def test_a_batch_whose_answer_was_lost_is_not_run_twice(echo: Engine, wire: Wire) -> None:
    async with link(wire.address) as worker:
        wire.is_stuck = True
        stream = worker.submit([4], sampling=greedy(3))
        await until(lambda: len(echo.core.seen) == 1)
        wire.drop_connections()
        wire.is_stuck = False
        assert tokens_of(await collect(stream)) == [4, 4, 4]
        assert tokens_of(await collect(worker.submit([5], sampling=greedy(1)))) == [5]
    assert [key[2] for key in echo.core.seen] == [1, 2]


async def test_a_worker_that_stays_away_loses_its_sequences_and_starts_afresh(
    folder: Path,
) -> None:
    limits = LinkLimits(resume_window_s=0.1)
    async with (
        engine(folder / "engine.sock", limits=limits) as echo,
        wire_between(folder / "wire.sock", echo.path) as wire,
    ):
        frames: list[Frame] = []
        async with link(wire.address, on_frame=frames.append) as worker:
            stream = worker.submit([1], sampling=greedy(10**6))
            await anext(stream)
            wire.cut()
            await until(lambda: not echo.core.running)
            wire.mend()
            with pytest.raises(EngineLost) as lost:
                await collect(stream)
            assert lost.value.is_retryable
            await until(lambda: worker.is_connected)
            assert tokens_of(await collect(worker.submit([2], sampling=greedy(2)))) == [2, 2]
            assert numbers(frames) == list(range(1, len(frames) + 1))


async def test_streams_are_lost_when_the_engine_stays_away_and_the_link_comes_back_with_it(
    folder: Path,
) -> None:
    path = folder / "engine.sock"
    frames: list[Frame] = []
    worker = EngineLink(
        f"unix:{path}",
        worker_id="w",
        worker_epoch=1,
        secret=None,
        on_frame=frames.append,
        # A test that is slow to read is no slow consumer.
        max_queued_events=1 << 20,
    )
    async with worker:
        with pytest.raises(EngineLost):
            await collect(worker.submit([1], sampling=greedy(1)))
        async with engine(path):
            await until(lambda: worker.is_connected)
            stream = worker.submit([1], sampling=greedy(10**6))
            await anext(stream)
            # Whoever did not read while the engine goes away would be too slow, not lost.
            reading = asyncio.create_task(collect(stream))
        with pytest.raises(EngineLost):
            await reading
        before = len(frames)
        async with engine(path):
            await until(lambda: worker.is_connected)
            assert tokens_of(await collect(worker.submit([3], sampling=greedy(1)))) == [3]
    assert numbers(frames) == list(range(1, before + 2))


async def test_a_new_epoch_of_a_worker_replaces_the_old_one(echo: Engine) -> None:
    async with link(echo.address, worker_epoch=1) as old:
        stream = old.submit([1], sampling=greedy(10**6))
        await anext(stream)
        reading = asyncio.create_task(collect(stream))
        async with link(echo.address, worker_epoch=2) as new:
            with pytest.raises(EngineLost):
                await reading
            await until(lambda: not echo.core.running)
            assert tokens_of(await collect(new.submit([2], sampling=greedy(2)))) == [2, 2]
            assert not old.is_connected


async def test_a_worker_that_acknowledges_nothing_is_held_back_and_the_others_are_not(
    folder: Path,
) -> None:
    limits = LinkLimits(max_unacknowledged_bytes=2_000)
    async with (
        engine(folder / "engine.sock", limits=limits) as echo,
        wire_between(folder / "wire.sock", echo.path) as wire,
        link(wire.address, worker_id="stuck") as stuck,
        link(echo.address, worker_id="fine") as fine,
    ):
        wire.is_stuck = True
        waiting = stuck.submit([1], sampling=greedy(1_000))
        await until(lambda: echo.core.held == {"stuck"})
        held_at = echo.core.running["stuck", 1, 1].num_generated_tokens
        assert held_at < 1_000
        assert len(await collect(fine.submit([2], sampling=greedy(500)))) == 500
        assert echo.core.running["stuck", 1, 1].num_generated_tokens == held_at
        wire.is_stuck = False
        assert len(tokens_of(await collect(waiting))) == 1_000


async def test_acknowledgements_flow_with_nothing_to_submit(folder: Path) -> None:
    limits = LinkLimits(max_unacknowledged_bytes=4_000)
    async with engine(folder / "engine.sock", limits=limits) as echo, link(echo.address) as worker:
        assert len(await collect(worker.submit([1], sampling=greedy(3_000)))) == 3_000
        await until(lambda: not echo.core.held)


async def test_a_stream_that_nobody_reads_is_aborted_alone(echo: Engine) -> None:
    async with link(echo.address, max_queued_events=10) as worker:
        unread = worker.submit([1], sampling=greedy(10**6))
        await until(lambda: not echo.core.running and bool(echo.core.seen))
        assert tokens_of(await collect(worker.submit([2], sampling=greedy(5)))) == [2] * 5
        assert tokens_of([await anext(unread) for _ in range(10)]) == [1] * 10
        with pytest.raises(SlowConsumer):
            await anext(unread)


async def test_a_failing_journal_ends_the_link_loudly(echo: Engine) -> None:
    def full_disk(frame: Frame) -> None:
        raise OSError("disk full")

    with pytest.raises(ExceptionGroup) as raised:
        async with link(echo.address, on_frame=full_disk) as worker:
            await collect(worker.submit([1], sampling=greedy(5)))
    assert raised.group_contains(OSError, match="disk full")


async def test_an_error_inside_the_link_reaches_the_caller_as_it_is(echo: Engine) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with link(echo.address):
            raise KeyError("mine")


async def test_a_connection_that_falls_silent_is_replaced(echo: Engine, wire: Wire) -> None:
    async with link(wire.address) as worker:
        echo.core.allow_steps(0)
        stream = worker.submit([6], sampling=greedy(3))
        wire.is_stuck = True
        await until(lambda: not worker.is_connected)
        wire.is_stuck = False
        echo.core.allow_steps(None)
        assert tokens_of(await collect(stream)) == [6, 6, 6]


async def test_leaving_the_link_ends_its_open_streams(echo: Engine) -> None:
    async with link(echo.address) as worker:
        stream = worker.submit([1], sampling=greedy(10**6))
        await anext(stream)
    with pytest.raises(EngineLost):
        await collect(stream)


async def test_an_orphan_that_reached_the_engine_is_aborted(echo: Engine) -> None:
    async with link(echo.address) as worker:
        stream = worker.submit([1], sampling=greedy(10**6))
        await anext(stream)
        # As after a loss: the link no longer knows the sequence, the engine still does.
        worker._streams.clear()
        await until(lambda: not echo.core.running)


async def test_a_command_that_no_message_can_say_fails_alone(echo: Engine) -> None:
    async with link(echo.address) as worker:
        told = [worker.submit([1, 2], sampling=greedy(4)) for _ in range(2)]
        untold = worker.submit([2**64], sampling=greedy(4))
        told.append(worker.submit([3], sampling=greedy(4)))
        with pytest.raises(EngineRefused, match="No engine can be told so"):
            await collect(untold)
        for stream in told:
            assert len(tokens_of(await collect(stream))) == 4


async def test_questions_are_answered(echo: Engine) -> None:
    async with link(echo.address) as worker:
        assert await worker.info() == INFO
        status = await worker.status()
        assert (status.is_healthy, status.resident_adapters) == (True, ["ab" * 32])
        assert status.hosted_adapters == ["ab" * 32, "cd" * 32]
        assert status.quarantined_adapters == ["ef" * 32]
        assert (status.tiers.num_reads, status.tiers.host_bytes) == (2, 2048)
        assert (await worker.probe("ab" * 32)).is_passed
        with pytest.raises(EngineRefused, match="No such adapter"):
            await worker.probe("cd" * 32)


async def test_an_engine_that_is_not_there_is_unreachable(folder: Path) -> None:
    nobody = EngineLink(
        f"unix:{folder}/none.sock",
        worker_id="w",
        worker_epoch=1,
        secret=None,
        on_frame=lambda frame: None,
    )
    async with nobody:
        assert not nobody.is_connected
        with pytest.raises(EngineUnreachable):
            await nobody.info()


async def test_a_core_that_fails_ends_the_server_and_loses_the_streams(folder: Path) -> None:
    async with (
        Engine(folder / "engine.sock").serve() as echo,
        link(echo.address) as worker,
    ):
        stream = worker.submit([1], sampling=greedy(10**6))
        await anext(stream)
        echo.core.must_fail = True
        with pytest.raises(EngineLost):
            await collect(stream)
    assert echo.has_ended_well is False


async def test_tcp_needs_the_secret(unused_tcp_port: int) -> None:
    address = f"http://127.0.0.1:{unused_tcp_port}"
    async with engine(Path(), address=address, secret="hush"):
        async with link(address, secret="hush") as worker:
            assert tokens_of(await collect(worker.submit([8], sampling=greedy(2)))) == [8, 8]
        for wrong in (None, "HUSH", "hus", "hush!"):
            stranger = EngineLink(
                address,
                worker_id="x",
                worker_epoch=1,
                secret=wrong,
                on_frame=lambda frame: None,
            )
            async with stranger:
                with pytest.raises(EngineRefused) as refused:
                    await stranger.info()
                assert refused.value.code == "secret_mismatch"
                assert not stranger.is_connected


async def test_an_abort_after_the_end_is_harmless(echo: Engine) -> None:
    async with link(echo.address) as worker:
        stream = worker.submit([1], sampling=greedy(1))
        await collect(stream)
        stream.abort()
        worker._send(Abort(stream.sequence_id))
        assert len(await collect(worker.submit([1], sampling=greedy(1)))) == 1
        await asyncio.sleep(0)


# What operators want


async def test_an_operator_moves_adapters_over_the_link(echo: Engine) -> None:
    async with link(echo.address) as worker:
        warm = await worker.warm("12" * 32, to="host", fingerprint="1-float32-aa")
        assert (warm.is_hosted, warm.is_resident, warm.is_pinned) == (True, False, False)
        assert echo.core.fingerprints == {"12" * 32: "1-float32-aa"}
        assert (await worker.pin("34" * 32)).is_pinned
        assert (await worker.status()).pinned_adapters == ["34" * 32]
        assert not (await worker.unpin("34" * 32)).is_pinned
        freed = await worker.forget("34" * 32)
        assert (freed.device_bytes, freed.disk_bytes, freed.is_in_use) == (1024, 4096, False)
        assert "34" * 32 not in (await worker.status()).resident_adapters


async def test_a_session_is_announced_when_the_engine_knows_nothing_of_what_was(
    folder: Path, echo: Engine, wire: Wire
) -> None:
    sessions: list[str] = []
    async with link(wire.address, on_session=lambda: sessions.append("new")) as worker:
        assert sessions == ["new"]
        wire.drop_connections()
        await until(lambda: wire.num_connections > 1 and worker.is_connected)
        assert (await worker.status()).num_running == 0
        assert sessions == ["new"]
        wire.cut()
        await until(lambda: not worker._can_resume)
        wire.mend()
        await until(lambda: len(sessions) == 2)


async def test_the_events_of_several_sequences_come_as_they_happen(echo: Engine) -> None:
    async with link(echo.address) as worker:
        lengths = (5, 1, 3)
        streams = [worker.submit([9], sampling=greedy(length)) for length in lengths]
        merged = MergedStreams(streams)
        events = await collect(merged)
        assert merged.next_event is None
    assert [event.sequence_id for event in events[:3]] == [s.sequence_id for s in streams]
    for stream, length in zip(streams, lengths, strict=True):
        own = [event for event in events if event.sequence_id == stream.sequence_id]
        assert [event.generated_tokens for event in own] == list(range(1, length + 1))
        assert own[-1].state is SequenceState.LENGTH


async def test_several_sequences_are_aborted_and_lost_together(echo: Engine) -> None:
    async with link(echo.address) as worker:
        merged = MergedStreams([worker.submit([9], sampling=greedy(10**6)) for _ in range(2)])
        told = [await anext(merged) for _ in range(4)]
        assert len({event.sequence_id for event in told}) == 2
        merged.abort()
        ends = [event for event in await collect(merged) if event.state.is_final]
        assert [event.state for event in ends] == [SequenceState.ABORTED] * 2
        lost = MergedStreams([worker.submit([9], sampling=greedy(10**6)) for _ in range(2)])
        await anext(lost)
    with pytest.raises(EngineLost):
        await collect(lost)
