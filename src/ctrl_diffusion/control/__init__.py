"""What obeys y: controls, the policy (prior + controls), and the conditions (c, y) it is trained on."""
