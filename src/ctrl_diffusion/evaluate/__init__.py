"""How good a control is: the certificate in nats, accuracy by a second opinion, fidelity, exact samples."""
