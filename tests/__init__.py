"""The tests, by kind: unit, property, contract, fault, sim, golden, integration, bench."""
