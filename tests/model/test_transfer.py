"""Copies to a GPU and back, on a make-believe one whose streams run late: nothing reads what is not there yet.

What is queued on a stream here runs when somebody waits for it, as late as a GPU may. Numbers that a copy should have
waited for are then wrong.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zotune.model.transfer import ToDevice


class Event:
    def __init__(self, stream):
        self._stream, self._place = stream, len(stream.queue)

    def synchronize(self):
        self._stream.run_to(self._place)


class Stream:
    """Work in order, of which nothing is done before it has to be."""

    def __init__(self, device=None):
        self.queue, self._done = [], 0

    def run_to(self, place):
        while self._done < place:
            self._done += 1
            self.queue[self._done - 1]()

    def synchronize(self):
        self.run_to(len(self.queue))

    def record_event(self):
        return Event(self)

    def wait_event(self, event):
        self.queue.append(event.synchronize)


class Late(TorchFunctionMode):
    """Within this context copies that need not be awaited are queued on a stream."""

    def __init__(self, stream):
        super().__init__()
        self._stream = stream

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not kwargs.pop("non_blocking", False):
            return func(*args, **kwargs)
        source, target = (args[0], torch.full_like(args[0], torch.nan)) if func is torch.Tensor.to else args[::-1]
        self._stream.queue.append(lambda: target.copy_(source))
        return target


@pytest.fixture
def gpu(monkeypatch):
    """A make-believe GPU: its streams, and the copies that the stream which computes is known to use."""
    main, known = Stream(), []
    empty = torch.empty
    patches = {"Stream": Stream, "stream": Late, "current_stream": lambda device: main}
    for name, fake in patches.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **more: empty(*size, **more))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: known.append((x, stream)))
    return SimpleNamespace(device=torch.device("cuda"), main=main, known=known)


def layers(number):
    torch.manual_seed(0)
    return [[nn.Parameter(torch.randn(3 + i, 4)), nn.Parameter(torch.randn(2).double())] for i in range(number)]


def passes(place, matrices, gpu, count, wrote):
    """Run the layers: each pass adds 1 to all numbers, on the stream that computes; what it has read, in order."""
    read = []
    for _ in range(count):
        for index, of_layer in enumerate(matrices):
            place.load(index, writes=wrote)
            for copy in [p.data for p in of_layer]:
                gpu.main.queue.append(lambda x=copy: read.append(x.clone()))
                gpu.main.queue.append(lambda x=copy: x.add_(1))
                assert any(x.data_ptr() == copy.data_ptr() and stream is gpu.main for x, stream in gpu.known)
            if len(matrices) > 1:
                place.prefetch((index + 1) % len(matrices))
            place.unload(index, wrote=wrote)
    place.wait()
    gpu.main.synchronize()
    return read


@pytest.mark.parametrize("wrote", [True, False])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_layers_come_whole_and_what_is_written_arrives(gpu, number, wrote):
    matrices = layers(number)
    before = [p.data.clone() for of_layer in matrices for p in of_layer]
    read = passes(ToDevice(matrices, gpu.device), matrices, gpu, 3, wrote)
    after = [p.data for of_layer in matrices for p in of_layer]
    assert len(read) == 3 * len(before)
    for number_read, x in enumerate(read):
        turn, which = divmod(number_read, len(before))
        torch.testing.assert_close(x, before[which] + turn * wrote)
    for x, expected in zip(after, before, strict=True):
        torch.testing.assert_close(x, expected + 3 * wrote)


def test_a_layer_is_brought_in_when_the_one_before_the_present_one_has_run(gpu):
    """So two layers are on the GPU, however far the host is ahead of it."""
    matrices, ran, seen = layers(4), [], []
    place = ToDevice(matrices, gpu.device)
    upload = place._upload

    def noted(index, has_run):
        found = upload(index, has_run)
        seen.append((index, list(ran)))
        return found

    place._upload = noted
    for index in range(4):
        place.load(index, writes=False)
        gpu.main.queue.append(lambda index=index: ran.append(index))
        if index < 3:
            place.prefetch(index + 1)
        place.unload(index, wrote=False)
    place.wait()
    assert seen == [(0, []), (1, []), (2, [0]), (3, [0, 1])]


def test_an_error_while_a_layer_comes_is_raised_where_it_is_used(gpu):
    matrices = layers(2)
    place = ToDevice(matrices, gpu.device)

    def lost(index, has_run):
        raise OSError("the disk is gone")

    place._upload = lost
    place.prefetch(0)
    with pytest.raises(OSError, match="the disk is gone"):
        place.load(0, writes=False)
