"""Secure aggregation: an aggregator learns the sum of many updates, and none of them.

Bonawitz et al. 2017 (CCS; ePrint 2017/281) over whatever carries small documents, with the graph of
Bell et al. 2020 (CCS; ePrint 2020/704) beyond nine members. docs/secure-aggregation.md has the
protocol and what it promises; nothing in here knows a network, a run or a clock.

    documents     what members and aggregator say to each other
    graph         who shares secrets with whom, and how many shares open one
    shares        Shamir's secret sharing
    masks         keys, and the streams of numbers that they give
    fixed_point   an update as whole numbers whose sum can't overflow
    member        a silo's side: advertise, share, seal, unmask; what it refuses
    aggregator    the other side: the sum, and its opening
"""
