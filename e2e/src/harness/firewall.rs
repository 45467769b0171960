//! Docker's part of the firewall: what of it came with our engine, and how it goes away. Rules of others, also
//! those that name Docker's chains, are not touched.

use std::collections::BTreeSet;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::debian::Packages;
use super::paths::Paths;
use super::traces::is_bridge;

/// The firewall before our engine first started.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Firewall {
    /// As `nft list tables` names them.
    tables: BTreeSet<String>,
    /// The output of iptables-save, by line.
    rules: BTreeSet<String>,
    /// The policy of the chain FORWARD, which Docker changes; absent where there was no such chain.
    forward_policy: Option<String>,
}

impl Firewall {
    /// Reads it as it is now.
    ///
    /// # Errors
    /// When iptables or nft fails.
    pub async fn read(packages: &Packages) -> Result<Self> {
        let rules = iptables_save(packages).await?;
        Ok(Self {
            tables: tables(packages).await?,
            forward_policy: forward_policy(&rules).map(str::to_owned),
            rules: rules.lines().map(str::to_owned).collect(),
        })
    }
}

/// The lines of iptables-save that came with our engine.
///
/// # Errors
/// When iptables fails.
pub async fn list(packages: &Packages, before: &Firewall) -> Result<Vec<String>> {
    Ok(ours(&iptables_save(packages).await?, before).map(str::to_owned).collect())
}

async fn tables(packages: &Packages) -> Result<BTreeSet<String>> {
    let tables = packages.output("nft", &["list", "tables"]).await?;
    Ok(tables.lines().filter_map(|line| line.strip_prefix("table ")).map(str::to_owned).collect())
}

async fn iptables_save(packages: &Packages) -> Result<String> {
    packages.output("iptables-save", &[]).await
}

/// The policy of the chain FORWARD in the output of iptables-save.
fn forward_policy(saved: &str) -> Option<&str> {
    let (_, filter) = saved.split_once("*filter\n")?;
    filter.lines().find_map(|line| line.strip_prefix(":FORWARD ")?.split(' ').next())
}

/// Lines of iptables-save that came with our engine.
fn ours<'a>(saved: &'a str, before: &Firewall) -> impl Iterator<Item = &'a str> {
    saved.lines().filter(|line| is_dockers(line) && !before.rules.contains(*line))
}

/// Whether a line of iptables-save names one of Docker's chains or bridges.
fn is_dockers(line: &str) -> bool {
    line.split([' ', ':']).any(|word| word.starts_with("DOCKER") || word == "docker0" || is_bridge(word))
}

/// The output of iptables-save without the lines of our engine, and with the policy of before for FORWARD.
fn without_ours(saved: &str, before: &Firewall) -> String {
    let ours: BTreeSet<&str> = ours(saved, before).collect();
    let mut kept = String::new();
    let mut table = "";
    for line in saved.lines().filter(|line| !ours.contains(line)) {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        }
        if table == "filter" && line.starts_with(":FORWARD ") {
            kept.push_str(":FORWARD ");
            kept.push_str(before.forward_policy.as_deref().unwrap_or("ACCEPT"));
            kept.push_str(" [0:0]\n");
        } else {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// Removes the lines of our engine, gives FORWARD its policy back, and removes the tables that are empty and new.
///
/// # Errors
/// When iptables or nft fails.
pub async fn restore(paths: &Paths, packages: &Packages, before: &Firewall) -> Result<()> {
    let saved = iptables_save(packages).await?;
    if ours(&saved, before).next().is_some() {
        let file = paths.state().join("firewall");
        std::fs::write(&file, without_ours(&saved, before))?;
        packages.output("iptables-restore", &[&file.to_string_lossy()]).await?;
        std::fs::remove_file(&file)?;
    }
    // iptables makes its tables when they are first used; those that are new and have no rule are of no use.
    for table in tables(packages).await?.difference(&before.tables) {
        let words: Vec<&str> = table.split(' ').collect();
        let listing = packages.output("nft", &[&["list", "table"], words.as_slice()].concat()).await?;
        if is_empty_table(&listing) {
            packages.output("nft", &[&["delete", "table"], words.as_slice()].concat()).await?;
        }
    }
    Ok(())
}

/// Whether the listing of an nft table has no rule: only the table, chains and their hooks.
fn is_empty_table(listing: &str) -> bool {
    listing.lines().map(str::trim).all(|line| {
        line.is_empty()
            || line == "}"
            || line.starts_with('#')
            || line.ends_with('{')
            || line.starts_with("type ")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
         -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n-A POSTROUTING -s 10.9.0.0/16 ! -o br-lan -j MASQUERADE\nCOMMIT\n\
         *filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n:MINE - [0:0]\n\
         -A DOCKER-USER -s 203.0.113.9/32 -j DROP\n-A FORWARD -j DOCKER-USER\n\
         -A FORWARD -i br-0123456789ab -o br-0123456789ab -j ACCEPT\n-A MINE -j RETURN\nCOMMIT\n";

    #[test]
    fn only_the_rules_of_our_engine_are_removed_and_the_policy_of_forward_goes_back() {
        let before = Firewall {
            rules: [":DOCKER-USER - [0:0]", "-A DOCKER-USER -s 203.0.113.9/32 -j DROP"]
                .map(str::to_owned)
                .into(),
            ..Firewall::default()
        };
        assert_eq!(
            without_ours(SAVED, &before),
            "*nat\n:PREROUTING ACCEPT [0:0]\n-A POSTROUTING -s 10.9.0.0/16 ! -o br-lan -j MASQUERADE\nCOMMIT\n\
             *filter\n:INPUT DROP [0:0]\n:FORWARD ACCEPT [0:0]\n:DOCKER-USER - [0:0]\n:MINE - [0:0]\n\
             -A DOCKER-USER -s 203.0.113.9/32 -j DROP\n-A MINE -j RETURN\nCOMMIT\n"
        );
    }

    #[test]
    fn the_policy_of_forward_is_read_from_the_filter_table() {
        assert_eq!(forward_policy(SAVED), Some("DROP"));
        assert_eq!(forward_policy("*nat\n:FORWARD DROP [0:0]\nCOMMIT\n"), None);
    }

    #[test]
    fn a_table_with_a_rule_is_not_empty() {
        let empty = "table ip nat {\n\tchain PREROUTING {\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n\t}\n}\n";
        assert!(is_empty_table(empty));
        assert!(!is_empty_table(&empty.replace("accept;\n", "accept;\n\t\tip daddr 10.0.0.1 drop\n")));
    }
}
