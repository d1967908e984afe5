"""TensorBoard's event files hold what was logged, in the framing that readers expect."""

import struct

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jexit.io.metrics import MetricsWriter
from jexit.io.tensorboard import EventFile


def masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(directory):
    """The events of every file, in order; checks lengths and checksums of the TFRecord framing."""
    events = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            length, length_crc = struct.unpack("<QI", data[:12])
            assert length_crc == masked_crc(data[:8])
            body, (body_crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length :][:4])
            assert body_crc == masked_crc(body)
            events.append(Event.FromString(body))
            data = data[16 + length :]
    return events


def scalars(events):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
    ]


def test_the_crc_is_the_castagnoli_one():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, section B.4 and every CRC catalogue


def test_metrics_reach_tensorboard_at_their_steps(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "share": [0.25, 0.75]})
        # Flushed line by line: a killed run loses nothing.
        assert len(scalars(read_events(tmp_path / "tensorboard"))) == 3
        writer.write(7, {"loss": 0.125})
    assert scalars(read_events(tmp_path / "tensorboard")) == [
        (1, "loss", 0.5),
        (1, "share/0", 0.25),
        (1, "share/1", 0.75),
        (7, "loss", 0.125),
    ]


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path):
    for resume_step in (None, 3):
        with MetricsWriter(tmp_path, resume_step) as writer:
            writer.write(4, {"loss": 1.0})
    starts = [
        event.step
        for event in read_events(tmp_path / "tensorboard")
        if event.HasField("session_log") and event.session_log.status == SessionLog.START
    ]
    # A reader drops what it holds of steps from a START event's on.
    assert starts == [0, 4]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_can_be_left_out(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as writer:

        def no_space(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(EventFile, "_write", no_space)
        with pytest.raises(ValueError, match=r"cannot write .*tensorboard: No space left"):
            writer.write(1, {"loss": 1.0})
