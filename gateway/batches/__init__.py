"""Many requests in one file, answered when there is time, and cheaper where a price says so.

lines     a line of the input, read and judged; a line of the output, spelled
orders    what tenants ask: create, show, list, cancel
claims    which gateway works at a batch, and what it writes down
slots     whose line may run next, fairly between tenants
job       one batch from its first line to its files
runner    the jobs of one gateway

Every line goes the way of any other request: the same limits, budgets, policies and ledger, for the
key that created the batch. It is the last class of the engine's, so that whoever waits goes first.

**Each line has one result, and is billed if and only if that result is kept.** The answer of a line
is "sent" when its result is written down. That is one transaction with the usage event, the hold
and the sums that belong to it (`claims.Claims.record`), so there is never one without the other:

- killed before it commits, there is neither. The journal knows a request that was opened and never
  sent, which is free; the line has no result, so whoever claims the batch next runs it again.
- killed after it, there are both. The journal still knows a request that was never sent and asks
  to release a hold that is settled already, which changes nothing; the line is not run again.
- not killed, the journal is told after it, settles the same request once more, and finds it done.

Two gateways may work at one batch for a moment, where a lease ran out and its gateway lives. The
transaction asks for the claim, and the result's key is the line's number: whoever comes second
writes nothing, neither result nor money, and lets its answer go. A commit whose outcome nobody
heard is tried again, and finds its own request in the result.
"""
