"""What every command needs: arguments, configs, atomic files, metrics. The ground floor."""
