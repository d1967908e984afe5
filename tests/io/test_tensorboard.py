"""TensorBoard's event files hold what was logged, in the framing that readers expect."""

import struct

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jexit.errors import UserError
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


def test_metrics_reach_tensorboard_at_their_steps(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, section B.4 and every CRC catalogue
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "share": [0.25, 0.75]})
        # Flushed line by line: a killed run loses nothing.
        assert len(scalars(read_events(tmp_path / "tensorboard"))) == 3
        writer.write(7, {"loss": 0.125})
    first = [(1, "loss", 0.5), (1, "share/0", 0.25), (1, "share/1", 0.75), (7, "loss", 0.125)]
    assert scalars(read_events(tmp_path / "tensorboard")) == first
    with MetricsWriter(tmp_path, resume_step=3):
        pass
    events = [e for e in read_events(tmp_path / "tensorboard") if e.HasField("session_log")]
    # A reader drops what it holds of steps from a START event's on.
    assert [e.step for e in events if e.session_log.status == SessionLog.START] == [0, 4]
    with MetricsWriter(tmp_path / "other", tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "other" / "tensorboard").exists()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    with MetricsWriter(tmp_path) as writer:
        monkeypatch.setattr(EventFile, "_write", no_space)
        with pytest.raises(UserError, match=r"cannot write .*tensorboard: No space left"):
            writer.write(1, {"loss": 1.0})
