"""Introspection after training: a frozen network learns to say when it is wrong, what is new to it, when to refuse.

In the order of use: ``layers`` finds where to look inside a network, ``depths`` makes one vector an image of what is
seen there, ``features`` reads these vectors once, ``heads`` takes a second look at them, ``calibration`` makes a
probability of what the heads say, ``novelty`` measures how strange an image is, ``refusal`` picks thresholds with a
promise. ``introspection`` is all of it as one module that is stored with the network, ``fit`` makes it,
``introspected`` joins it to the network.
"""
