"""Measure a control: the certificate in nats, accuracy by a second opinion, fidelity, exact samples."""
