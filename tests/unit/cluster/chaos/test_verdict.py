"""What counts as a broken promise."""

from pdserve.cluster.chaos.load import Answer, Question, ask_all, drawn
from pdserve.cluster.chaos.verdict import held_in, judge

CALM = [Answer(0, [1, 2, 3]), Answer(1, [4, 5])]


def test_equal_answers_in_any_order_and_number_are_good() -> None:
    verdict = judge(CALM, [Answer(1, [4, 5]), Answer(0, [1, 2, 3]), Answer(1, [4, 5])], {})
    assert verdict.good
    assert verdict.answers == 3


def test_a_token_that_differs_is_beyond_the_end_or_missing_is_wrong() -> None:
    struck = [Answer(0, [1, 9, 3]), Answer(1, [4, 5, 6]), Answer(0, [1, 2])]
    verdict = judge(CALM, struck, {})
    assert verdict.wrong == (
        "question 0: token 1 is 9, not 2",
        "question 1: token 2 is 6, not the end",
        "question 0: ends after 2 of 3",
    )
    assert not verdict.good


def test_a_wrong_token_before_an_error_is_wrong_and_an_error_alone_is_lost() -> None:
    verdict = judge(CALM, [Answer(0, [7], "broken"), Answer(0, [1], "broken")], {})
    assert verdict.wrong == ("question 0: token 0 is 7, not 1",)
    assert verdict.lost == ("question 0: broken",)


def test_what_is_still_held_is_named() -> None:
    snapshot = {
        "queue_lengths": [1, 0],
        "parked": 0,
        "phases": {"queued": 1, "finished": 7},
        "workers": [
            {
                "running": 0,
                "waiting": 0,
                "block_count": 10,
                "free_blocks": 8,
                "counters": {"store_tickets": 1},
            }
        ],
    }
    verdict = judge(CALM, [], held_in(snapshot))
    assert verdict.held == {
        "waiting requests": 1,
        "queue entries": 1,
        "device blocks": 2,
        "store tickets": 1,
    }
    assert not verdict.good


def test_questions_are_drawn_from_the_seed_and_each_is_asked_once() -> None:
    questions = drawn(3)
    assert questions == drawn(3)
    assert questions != drawn(4)
    stem = questions[0].prompt[:20]
    assert sum(question.prompt[:20] == stem for question in questions) > 1

    def ask(question: Question) -> Answer:
        return Answer(-1, [question.seed])

    answers = ask_all(ask, questions, clients=1)
    assert [answer.tokens for answer in answers] == [[q.seed] for q in questions]
    assert [answer.question for answer in answers] == list(range(len(questions)))
