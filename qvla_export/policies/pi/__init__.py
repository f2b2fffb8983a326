"""pi0 and pi0.5: PaliGemma reads images and prompt once, a smaller expert integrates a flow."""
