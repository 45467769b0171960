use super::*;

const DOMAIN: &str = "trust_domain = \"fleet.example.com\"\n";

fn of(text: &str, environment: &[(&str, &str)]) -> Result<Config, String> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("hub.toml");
    std::fs::write(&file, text).unwrap();
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    load(Some(&file), &environment.collect(), &Flags::default()).map_err(|refused| refused.to_string())
}

#[test]
fn what_is_printed_gives_the_same_again() {
    let config = of(&format!("{DOMAIN}history_days = 7\n[api]\ntoken_file = \"token\"\n"), &[]).unwrap();
    assert_eq!(of(&config.to_toml(), &[]).unwrap(), config);
    assert_eq!(config.history, Duration::from_hours(168));
}

#[test]
fn the_environment_wins_over_the_file() {
    let config = of(DOMAIN, &[("STSB_HUB_API__LISTEN", "127.0.0.1:1"), ("STSB_LISTEN", "not ours")]).unwrap();
    assert_eq!(config.api.listen.port(), 1);
}

#[test]
fn an_api_that_others_can_reach_needs_a_token_and_certificates() {
    let text = |api: &str| format!("{DOMAIN}[api]\nlisten = \"0.0.0.0:9444\"\n{api}");
    for api in ["", "token_file = \"token\"", "certificates = \"tls\""] {
        let refused = of(&text(api), &[]).expect_err(api);
        assert!(refused.contains("api.listen = 0.0.0.0:9444"), "{refused}");
    }
    assert!(of(&text("token_file = \"token\"\ncertificates = \"tls\""), &[]).is_ok());
}

#[test]
fn without_a_trust_domain_the_hub_would_know_nobody() {
    let refused = of("", &[]).expect_err("it is missing");
    assert!(refused.contains("trust_domain") && refused.contains("pki init"), "{refused}");
}
