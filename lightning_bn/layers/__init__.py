"""Operations on single BatchNorm layers: find them, attach a behavior, detach it."""
