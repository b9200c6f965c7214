"""Import a diffusion policy of LeRobot or diffusion_policy."""

from scripts.command import command

EXAMPLE = "python scripts/import_checkpoint.py source=lerobot/diffusion_pusht output_dir=outputs/imported env=pusht"
main = command("import", "policy.commands.import_checkpoint:import_checkpoint", EXAMPLE)

if __name__ == "__main__":
    main()
