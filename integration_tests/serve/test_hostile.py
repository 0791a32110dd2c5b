"""Hostile requests never cost more than their own answer. The long form: ``python integration_tests/serve/fuzz.py``."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

import fuzz
import hostile
import pytest
import serve_world

Service = tuple[serve_world.Running, tuple[bytes, ...]]


@pytest.mark.parametrize("seed", [11, 12])
def test_hostile_requests_are_answered_with_problems_and_everybody_else_as_before(service: Service, seed: int) -> None:
    running, secrets = service
    findings, bystander = fuzz.fuzz(running.url, secrets, count=250, seed=seed)
    assert not findings.faults, findings.faults[:5]
    assert sum(sum(counts.values()) for counts in findings.statuses.values()) == 250
    assert bystander.searches == 6 and bystander.slowest < 10


def test_every_picture_that_is_a_bomb_is_refused_and_searches_go_on(service: Service) -> None:
    running, secrets = service
    findings = fuzz.Findings()
    for number, data in enumerate(hostile._bombs()):
        body = hostile._form("/v1/search/image", [hostile._part(b"file", data, file=b"q.png")])
        request = hostile.Request("picture", body)
        answer, ended = fuzz.send(_address(running), request)
        outcome, faults = fuzz.judge(request, answer, ended, secrets)
        findings.note(number, request, outcome, 0.0, faults)
    assert not findings.faults, findings.faults
    assert set(findings.statuses["picture"]) <= {"200", "413", "422"}
    with fuzz.Bystander(running.url) as bystander:
        assert not bystander.faults()


def test_many_clients_that_say_nothing_cost_nobody_else_anything(service: Service) -> None:
    running, _ = service
    head = b"POST /v1/items HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n" + hostile.KNOWN + b"\r\n"
    body = head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b"
    connections = [socket.create_connection(_address(running)) for _ in range(60)]
    try:
        for number, connection in enumerate(connections):
            connection.sendall((b"", head, body)[number % 3])
        with fuzz.Bystander(running.url) as bystander:
            assert not bystander.faults()
            assert bystander.slowest < 10
        deadline = time.monotonic() + 45  # seconds after which all of them are sent away, answered or not
        for connection in connections:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            answer = connection.recv(1000)
            assert answer == b"" or b" 408 " in answer
    finally:
        for connection in connections:
            connection.close()


def _address(running: serve_world.Running) -> tuple[str, int]:
    parts = urlsplit(running.url)
    return str(parts.hostname), int(parts.port or 80)
