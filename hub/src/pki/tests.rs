use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::*;

const DAY: Duration = Duration::from_hours(24);
const ID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn authority(trust_domain: &str) -> Authority {
    Authority::of(&Authority::create(&trust_domain.parse().unwrap(), now()).unwrap()).unwrap()
}

fn cluster() -> Holder {
    Holder::Cluster(ID.parse().unwrap())
}

fn hub() -> Holder {
    Holder::Hub(vec!["hub.example.com".to_owned(), "192.0.2.7".to_owned()])
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

fn roots(authority: &Authority) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(der(authority.certificate())).unwrap();
    Arc::new(roots)
}

fn unix(time: Timestamp) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(time.as_second()).unwrap()))
}

/// What a TLS server says of a client with this certificate.
fn as_client(authority: &Authority, issued: &Issued, at: Timestamp) -> Result<(), rustls::Error> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(authority), default_provider().into()).build();
    verifier.unwrap().verify_client_cert(&der(&issued.certificate), &[], unix(at)).map(|_| ())
}

/// What a TLS client says of a server with this certificate.
fn as_server(authority: &Authority, issued: &Issued, name: &str, at: Timestamp) -> Result<(), rustls::Error> {
    let verifier =
        WebPkiServerVerifier::builder_with_provider(roots(authority), default_provider().into()).build();
    let name = ServerName::try_from(name).unwrap().to_owned();
    verifier.unwrap().verify_server_cert(&der(&issued.certificate), &[], &name, &[], unix(at)).map(|_| ())
}

#[test]
fn a_cluster_s_certificate_is_a_client_s_of_its_authority_for_its_time() {
    let ours = authority("fleet.example.com");
    let issued = ours.issue(&cluster(), 90 * DAY, now()).unwrap();
    as_client(&ours, &issued, now()).unwrap();
    as_client(&ours, &issued, now() - SignedDuration::from_mins(4)).unwrap();
    as_client(&ours, &issued, now() + SignedDuration::from_hours(24 * 90 - 1)).unwrap();

    assert!(as_client(&ours, &issued, now() - SignedDuration::from_mins(6)).is_err(), "not yet");
    assert!(as_client(&ours, &issued, now() + SignedDuration::from_hours(24 * 90 + 1)).is_err(), "no more");
    assert!(as_client(&authority("fleet.example.com"), &issued, now()).is_err(), "another authority's");
    let hub = ours.issue(&hub(), DAY, now()).unwrap();
    assert!(as_client(&ours, &hub, now()).is_err(), "a server's");
}

#[test]
fn it_names_the_cluster_once_and_nothing_else() {
    let issued = authority("fleet.example.com").issue(&cluster(), DAY, now()).unwrap();
    let der = der(&issued.certificate);
    let (_, certificate) = X509Certificate::from_der(&der).unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    let uri = format!("spiffe://fleet.example.com/cluster/{ID}");
    assert_eq!(names.value.general_names, [GeneralName::URI(&uri)]);
    assert_eq!(certificate.subject().iter().count(), 0, "{}", certificate.subject());
    assert!(!certificate.is_ca());
}

#[test]
fn the_hub_s_certificate_is_a_server_s_under_each_of_its_names() {
    let ours = authority("fleet.example.com");
    let issued = ours.issue(&hub(), DAY, now()).unwrap();
    for name in ["hub.example.com", "192.0.2.7"] {
        as_server(&ours, &issued, name, now()).unwrap();
    }
    assert!(as_server(&ours, &issued, "example.com", now()).is_err(), "another name");
    let cluster = ours.issue(&cluster(), DAY, now()).unwrap();
    assert!(as_server(&ours, &cluster, "hub.example.com", now()).is_err(), "a client's");
    for (names, said) in [(vec![], "has no name"), (vec!["a b".to_owned()], "\"a b\" is no host name")] {
        let refused = ours.issue(&Holder::Hub(names), DAY, now()).err().unwrap().to_string();
        assert!(refused.contains(said), "{refused}");
    }
}

#[test]
fn no_certificate_outlives_its_authority() {
    let ours = authority("fleet.example.com");
    let late = now() + SignedDuration::from_hours(24 * i64::from(AUTHORITY_DAYS - 1));
    let issued = ours.issue(&cluster(), 90 * DAY, late).unwrap();
    as_client(&ours, &issued, late + SignedDuration::from_hours(23)).unwrap();
    assert!(as_client(&ours, &issued, late + SignedDuration::from_hours(25)).is_err());
    let too_late = now() + SignedDuration::from_hours(24 * i64::from(AUTHORITY_DAYS) + 1);
    let refused = ours.issue(&cluster(), DAY, too_late);
    assert!(matches!(refused, Err(PkiError::Expired { .. })));
}

#[test]
fn an_authority_is_known_by_its_key_and_its_trust_domain() {
    let [one, other] = [(), ()].map(|()| Authority::create(&"a.example".parse().unwrap(), now()).unwrap());
    assert_eq!(Authority::of(&one).unwrap().trust_domain().to_string(), "a.example");
    let mixed = Issued { certificate: one.certificate.clone(), key: other.key };
    let refused = Authority::of(&mixed).err().unwrap().to_string();
    assert!(refused.contains("does not belong to its certificate"), "{refused}");

    let leaf = Authority::of(&one).unwrap().issue(&cluster(), DAY, now()).unwrap();
    let refused = Authority::of(&leaf).err().unwrap().to_string();
    assert!(refused.contains("names no trust domain"), "{refused}");
}

#[test]
fn directories_are_written_once_and_keys_are_their_owner_s() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let domain: TrustDomain = "fleet.example.com".parse().unwrap();
    create(&at("ca"), &domain, now()).unwrap();
    assert_eq!(issue(&at("ca"), &at("prod"), &cluster(), DAY, now()).unwrap(), domain);
    let read = |path: &str| std::fs::read_to_string(at(path)).unwrap();
    assert_eq!(read("prod/ca.crt"), read("ca/tls.crt"));
    for key in ["ca/tls.key", "prod/tls.key"] {
        assert_eq!(at(key).metadata().unwrap().permissions().mode() & 0o777, 0o600, "{key}");
    }
    let issued = Issued { certificate: read("prod/tls.crt"), key: read("prod/tls.key") };
    let ca = Authority::of(&Issued { certificate: read("ca/tls.crt"), key: read("ca/tls.key") }).unwrap();
    as_client(&ca, &issued, now()).unwrap();

    let before = read("prod/tls.key");
    let again = issue(&at("ca"), &at("prod"), &cluster(), DAY, now());
    assert!(matches!(again, Err(FilesError::Exists { .. })), "{again:?}");
    let again = create(&at("ca"), &domain, now());
    assert!(matches!(again, Err(FilesError::Exists { .. })), "{again:?}");
    assert_eq!(read("prod/tls.key"), before);
    let nowhere = issue(&at("none"), &at("other"), &cluster(), DAY, now());
    assert!(matches!(nowhere, Err(FilesError::Read { .. })), "{nowhere:?}");
    let left: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}
