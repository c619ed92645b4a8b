"""Watch what a server answers: flags, drift, alerts, and a store of answers from which a person can be removed."""
