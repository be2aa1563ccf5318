"""What a tenant's requests may ask for, and what may be said in them.

document    the policy as an operator writes it
patterns    its deny rules, compiled by RE2 and looked for
rules       all that can be decided here, without asking anybody
screen      an answer under deny rules, while it grows
moderation  the webhook that is asked, and an answer that waits for what it says
decisions   how often each rule decided what: counted and audited
watch       one request under its policy
store       how policies are set, and remembered while in use

No text is stored, logged or put into an error here. Knows nothing of HTTP routes, of engines or of
money: a refused prompt never had a hold, and what an answer made before it was cut is billed like
any other.
"""
