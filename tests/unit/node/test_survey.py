"""Every pair of a small cluster is measured once, then again when nobody is disturbed by it."""

from yoke.core.node import NodeId
from yoke.node.survey import FULL_MESH, REFRESH_S, RETRY_S, Survey

NODES = [NodeId(f"{i:064x}") for i in range(12)]


def measure_all(survey: Survey, nodes: list[NodeId], now_s: float = 0.0) -> list[tuple[NodeId, NodeId]]:
    pairs = []
    while (pair := survey.next(nodes, now_s, is_idle=False)) is not None:
        survey.found(pair, 1e-3, 1e8, 2e8, now_s)
        pairs.append(pair)
    return pairs


def test_each_pair_of_few_is_measured_once_and_both_ways_are_known() -> None:
    survey = Survey()
    assert len(set(measure_all(survey, NODES[:4]))) == 6
    assert survey.is_complete(NODES[:4], 0.0)
    links = {(link.source, link.target): link for link in survey.links}
    assert len(links) == 12
    assert links[NODES[0], NODES[1]].bandwidth_bytes_per_s == 1e8
    assert links[NODES[1], NODES[0]].bandwidth_bytes_per_s == 2e8


def test_of_many_the_coordinators_links_are_measured_and_those_of_the_first_few() -> None:
    pairs = measure_all(Survey(), NODES)
    assert len(pairs) == FULL_MESH * (FULL_MESH - 1) // 2 + len(NODES) - FULL_MESH
    assert {(NODES[0], node) for node in NODES[1:]} <= set(pairs)


def test_old_figures_are_refreshed_only_while_nobody_is_disturbed() -> None:
    survey = Survey()
    measure_all(survey, NODES[:2])
    later_s = REFRESH_S + 1
    assert survey.next(NODES[:2], later_s, is_idle=False) is None
    assert survey.next(NODES[:2], later_s, is_idle=True) == (NODES[0], NODES[1])


def test_pair_that_cannot_be_measured_rests_and_keeps_what_was_known() -> None:
    survey = Survey()
    measure_all(survey, NODES[:2])
    survey.failed((NODES[0], NODES[1]), 5.0)
    assert len(survey.links) == 2
    other = Survey()
    other.failed((NODES[0], NODES[1]), 5.0)
    assert other.is_complete(NODES[:2], 5.0)
    assert not other.is_complete(NODES[:2], 5.0 + RETRY_S)


def test_links_of_the_gone_are_forgotten() -> None:
    survey = Survey()
    measure_all(survey, NODES[:3])
    survey.keep(NODES[:2])
    assert len(survey.links) == 2
    assert not survey.is_complete(NODES[:3], 0.0)
