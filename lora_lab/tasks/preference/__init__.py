"""Better and worse answers: DPO, IPO, SimPO, ORPO, KTO."""
