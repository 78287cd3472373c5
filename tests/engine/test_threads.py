"""One model in several threads: a call beside another one is refused, calls in turn are right."""

import threading

import pytest
import torch

from hf_tokens import UnsupportedError, get_token_model
from hf_tokens.testing import probe_config, zoo


def in_thread(call):
    """What a call gives in a thread of its own: an output or an error."""
    found = []

    def work():
        try:
            found.append(call())
        except UnsupportedError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    return found[0]


@pytest.fixture
def specimen():
    specimen = zoo.build("llama")
    specimen.model = get_token_model(specimen.model, probe_config(0.5))
    return specimen


def beside(specimen, run):
    """What the model says in a second thread while a first call stands in its third block, and what that call says."""
    found, first = [], threading.get_ident()

    def call_beside(*_):
        if threading.get_ident() == first:
            found.append(in_thread(run))

    handle = specimen.model.get_base_model().model.layers[2].mlp.register_forward_hook(call_beside)
    own = run()
    handle.remove()
    return found[0], own


def by_forward(specimen):
    """The same as its call."""
    with torch.no_grad():
        return zoo.tensors(specimen.model.get_base_model().forward(**specimen.inputs))


@pytest.mark.parametrize("run", [zoo.Specimen.run, by_forward], ids=["call", "forward"])
def test_a_call_beside_another_is_refused(specimen, run):
    alone = specimen.run()
    other, own = beside(specimen, lambda: run(specimen))
    assert isinstance(other, UnsupportedError) and "one call at a time, got a call while another thread's runs. Take turns" in str(other)
    assert torch.equal(own[0], alone[0])


def test_calls_in_turn_are_right(specimen):
    alone = specimen.run()
    assert all(torch.equal(in_thread(specimen.run)[0], alone[0]) for _ in range(2))
    assert torch.equal(specimen.run()[0], alone[0])


def test_without_an_adapter_threads_are_free(specimen):
    with specimen.model.disable_adapter():
        other, own = beside(specimen, specimen.run)
    assert torch.equal(other[0], own[0])
