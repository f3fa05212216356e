"""The router: which request goes where, and when. Pure cores; no clock, no socket, no thread.

In: what gateways ask for (submit, cancel) and what workers say (hello, report, parked, failed).
Out: commands, to workers (dispatch, preempt, cancel, resume) and to gateways (refused, lost). A
shell in ``pdserve.cluster`` carries both; the simulator drives the same cores in virtual time.

    core         events in, commands out: start reading here
    planner      what to do next: resume, dispatch, preempt
    endings      how a request leaves before its time
    state        every request that is somewhere, in exactly one place
    levels       the order of waiting prompts: skip-join levels
    placement    the two choices: a prefill worker, a decode worker
    prefix_index who has which blocks, as far as their reports say
    worker       what the router knows of each worker
    fleet        all of them, in arrays
    scaling      how many workers each pool wants
    signals      by what figures
    duties       which role a worker has
"""
