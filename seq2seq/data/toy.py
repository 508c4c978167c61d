"""A small English-German grammar that generates a random parallel corpus.

Every sentence is built in both languages simultaneously from tokens that carry link keys; an English and a
German token that share a key translate each other, so the construction yields the word alignment.
Each English sentence has exactly one translation, and every ambiguity is resolved inside the sentence.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

SIZES = {"train": 20_000, "validation": 500, "test": 500}
LONGEST = 24  # English words and marks
T = TypeVar("T")


class Pair(NamedTuple):
    """A sentence, its translation, and the word alignment."""

    source: str
    target: str
    links: tuple[tuple[int, int], ...]


class Token(NamedTuple):
    """One word of either language with the keys that it shares with its translations."""

    text: str
    keys: tuple[int, ...] = ()


Tokens = tuple[Token, ...]
Sides = tuple[Tokens, Tokens]  # the same in English and German
new_key = itertools.count(1).__next__


def words(text: str) -> list[str]:
    """Split a sentence into words and punctuation marks; hyphens and apostrophes stay inside words."""
    return re.findall(r"\w+(?:[-'’]\w+)*|[^\w\s]", text)


def tokens(text: str, *keys: int) -> Tokens:
    """The words of a phrase, all carrying the same keys."""
    return tuple(Token(word, keys) for word in text.split())


def joined(pieces: Iterable[Sides]) -> Sides:
    """Concatenate pieces in both languages."""
    english: Tokens = ()
    german: Tokens = ()
    for left, right in pieces:
        english, german = english + left, german + right
    return english, german


def align(english: str, german: str) -> Sides:
    """Link two phrases word by word where they are equally long, otherwise all to all."""
    pairs = list(zip(english.split(), german.split(), strict=False))
    if len(english.split()) != len(german.split()):
        pairs = [(english, german)]
    keyed = [(left, right, new_key()) for left, right in pairs]
    return joined((tokens(left, key), tokens(right, key)) for left, right, key in keyed)


class Dice:
    """Random choices built on random() alone, whose stream no Python version changes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options, all equally likely."""
        return options[int(self.random() * len(options))]


# ---------------------------------------------------------------------------------------------------
# Lexicon. Nouns: english[/plural]|German gender [genitive] plural, where "-" stands for no plural and
# a genitive in -n marks the weak declension; feminine nouns have no genitive ending. Places add the
# English preposition of location and the German ones of location and direction.

NOUN_TABLE = {
    "folk": """man/men|Mann m Mannes Männer; woman/women|Frau f Frauen; boy|Junge m Jungen Jungen;
        girl|Mädchen n Mädchens Mädchen; child/children|Kind n Kindes Kinder; king|König m Königs Könige;
        queen|Königin f Königinnen; guest|Gast m Gastes Gäste; tourist|Tourist m Touristen Touristen;
        prince|Prinz m Prinzen Prinzen; princess|Prinzessin f Prinzessinnen; customer|Kunde m Kunden Kunden""",
    "job": """teacher|Lehrer m Lehrers Lehrer; doctor|Arzt m Arztes Ärzte; baker|Bäcker m Bäckers Bäcker;
        student|Student m Studenten Studenten; farmer|Bauer m Bauern Bauern; judge|Richter m Richters
        Richter; gardener|Gärtner m Gärtners Gärtner; policeman/policemen|Polizist m Polizisten Polizisten;
        pilot|Pilot m Piloten Piloten; chef|Koch m Kochs Köche; waiter|Kellner m Kellners Kellner;
        lawyer|Anwalt m Anwalts Anwälte; singer|Sänger m Sängers Sänger; artist|Künstler m Künstlers
        Künstler; soldier|Soldat m Soldaten Soldaten; waitress|Kellnerin f Kellnerinnen;
        actress|Schauspielerin f Schauspielerinnen; nurse|Krankenschwester f Krankenschwestern""",
    "kin": """father|Vater m Vaters -; mother|Mutter f -; brother|Bruder m Bruders Brüder; sister|Schwester
        f Schwestern; son|Sohn m Sohnes Söhne; daughter|Tochter f Töchter; uncle|Onkel m Onkels Onkel;
        aunt|Tante f Tanten; grandfather|Großvater m Großvaters -; grandmother|Großmutter f -;
        friend|Freund m Freundes Freunde; neighbor|Nachbar m Nachbarn Nachbarn; colleague|Kollege m
        Kollegen Kollegen""",
    "animal": """dog|Hund m Hundes Hunde; cat|Katze f Katzen; horse|Pferd n Pferdes Pferde; cow|Kuh f Kühe;
        pig|Schwein n Schweins Schweine; bird|Vogel m Vogels Vögel; mouse/mice|Maus f Mäuse; bear|Bär m
        Bären Bären; lion|Löwe m Löwen Löwen; rabbit|Kaninchen n Kaninchens Kaninchen; duck|Ente f Enten;
        elephant|Elefant m Elefanten Elefanten; monkey|Affe m Affen Affen; fox|Fuchs m Fuchses Füchse;
        goat|Ziege f Ziegen; donkey|Esel m Esels Esel""",
    "fruit": """apple|Apfel m Apfels Äpfel; pear|Birne f Birnen; banana|Banane f Bananen; orange|Orange f
        Orangen; cherry|Kirsche f Kirschen; tomato|Tomate f Tomaten; potato|Kartoffel f Kartoffeln;
        carrot|Karotte f Karotten; strawberry|Erdbeere f Erdbeeren""",
    "snack": """egg|Ei n Eis Eier; cake|Kuchen m Kuchens Kuchen; cookie|Keks m Kekses Kekse; sausage|Wurst
        f Würste; roll|Brötchen n Brötchens Brötchen; pizza|Pizza f Pizzas""",
    "food": """bread|Brot n Brotes -; cheese|Käse m Käses -; soup|Suppe f -; meat|Fleisch n Fleisches -;
        rice|Reis m Reises -; chocolate|Schokolade f -; honey|Honig m Honigs -; ham|Schinken m Schinkens -""",
    "drink": """water|Wasser n Wassers -; milk|Milch f -; coffee|Kaffee m Kaffees -; tea|Tee m Tees -;
        beer|Bier n Biers -; wine|Wein m Weins -; juice|Saft m Saftes -; lemonade|Limonade f -""",
    "text": """book|Buch n Buches Bücher; letter|Brief m Briefes Briefe; story|Geschichte f Geschichten;
        postcard|Postkarte f Postkarten; poem|Gedicht n Gedichts Gedichte; novel|Roman m Romans Romane;
        newspaper|Zeitung f Zeitungen; magazine|Zeitschrift f Zeitschriften""",
    "clothing": """coat|Mantel m Mantels Mäntel; hat|Hut m Hutes Hüte; shirt|Hemd n Hemdes Hemden;
        dress|Kleid n Kleides Kleider; skirt|Rock m Rocks Röcke; jacket|Jacke f Jacken; sweater|Pullover m
        Pullovers Pullover; scarf/scarves|Schal m Schals Schals; blouse|Bluse f Blusen""",
    "item": """key|Schlüssel m Schlüssels Schlüssel; pencil|Bleistift m Bleistifts Bleistifte;
        knife/knives|Messer n Messers Messer; spoon|Löffel m Löffels Löffel; fork|Gabel f Gabeln;
        photo|Foto n Fotos Fotos; picture|Bild n Bildes Bilder; ball|Ball m Balls Bälle; ring|Ring m Rings
        Ringe; towel|Handtuch n Handtuchs Handtücher; blanket|Decke f Decken; ticket|Fahrkarte f
        Fahrkarten; umbrella|Regenschirm m Regenschirms Regenschirme""",
    "vessel": """bottle|Flasche f Flaschen; glass|Glas n Glases Gläser; cup|Tasse f Tassen; vase|Vase f
        Vasen; candle|Kerze f Kerzen; bowl|Schüssel f Schüsseln; basket|Korb m Korbs Körbe; pot|Topf m
        Topfs Töpfe; box|Kiste f Kisten; suitcase|Koffer m Koffers Koffer; bucket|Eimer m Eimers Eimer""",
    "device": """computer|Computer m Computers Computer; radio|Radio n Radios Radios; lamp|Lampe f Lampen;
        television|Fernseher m Fernsehers Fernseher; phone|Telefon n Telefons Telefone; camera|Kamera f
        Kameras; clock|Uhr f Uhren""",
    "wheels": """car|Auto n Autos Autos; bicycle|Fahrrad n Fahrrads Fahrräder; truck|Lastwagen m Lastwagens
        Lastwagen; motorcycle|Motorrad n Motorrads Motorräder; tractor|Traktor m Traktors Traktoren""",
    "transport": """bus|Bus m Busses Busse; train|Zug m Zuges Züge; ship|Schiff n Schiffes Schiffe;
        taxi|Taxi n Taxis Taxis; ferry|Fähre f Fähren; boat|Boot n Bootes Boote""",
    "music": """guitar|Gitarre f Gitarren; piano|Klavier n Klaviers Klaviere; violin|Geige f Geigen;
        flute|Flöte f Flöten; trumpet|Trompete f Trompeten""",
    "opening": """door|Tür f Türen; window|Fenster n Fensters Fenster; gate|Tor n Tores Tore;
        drawer|Schublade f Schubladen""",
    "furniture": """table|Tisch m Tisches Tische; chair|Stuhl m Stuhls Stühle; sofa|Sofa n Sofas Sofas;
        bed|Bett n Bettes Betten; shelf/shelves|Regal n Regals Regale; bench|Bank f Bänke; cupboard|Schrank
        m Schranks Schränke; desk|Schreibtisch m Schreibtischs Schreibtische""",
    "room": """kitchen|Küche f Küchen|in in in; office|Büro n Büros Büros|in in in; cellar|Keller m Kellers
        Keller|in in in; bathroom|Badezimmer n Badezimmers Badezimmer|in in in; garage|Garage f Garagen|in
        in in""",
    "home": """house|Haus n Hauses Häuser|in in in; village|Dorf n Dorfes Dörfer|in in in; city|Stadt f
        Städte|in in in; castle|Schloss n Schlosses Schlösser|in in in; hotel|Hotel n Hotels Hotels|in in
        in; island|Insel f Inseln|on auf auf; farm|Bauernhof m Bauernhofs Bauernhöfe|on auf auf""",
    "work": """hospital|Krankenhaus n Krankenhauses Krankenhäuser|in in in; school|Schule f Schulen|at in
        zu; museum|Museum n Museums Museen|in in in; library|Bibliothek f Bibliotheken|in in in;
        restaurant|Restaurant n Restaurants Restaurants|in in in; theater|Theater n Theaters Theater|in in
        in; bakery|Bäckerei f Bäckereien|in in zu; supermarket|Supermarkt m Supermarkts Supermärkte|in in
        zu; station|Bahnhof m Bahnhofs Bahnhöfe|at an zu; airport|Flughafen m Flughafens Flughäfen|at an
        zu; market|Markt m Marktes Märkte|at auf auf; factory|Fabrik f Fabriken|in in in""",
    "nature": """garden|Garten m Gartens Gärten|in in in; park|Park m Parks Parks|in in in; forest|Wald m
        Waldes Wälder|in in in; zoo|Zoo m Zoos Zoos|in in in; beach|Strand m Strandes Strände|on an an;
        lake|See m Sees Seen|at an zu; river|Fluss m Flusses Flüsse|at an zu; bridge|Brücke f Brücken|on
        auf zu; meadow|Wiese f Wiesen|in auf auf""",
    "practice": """doctor's|Arzt m Arztes -|at bei zu; hairdresser's|Friseur m Friseurs -|at bei zu;
        baker's|Bäcker m Bäckers -|at bei zu""",
    "event": """concert|Konzert n Konzerts Konzerte; exam|Prüfung f Prüfungen; party|Feier f Feiern;
        meeting|Sitzung f Sitzungen; lesson|Unterricht m Unterrichts -; wedding|Hochzeit f Hochzeiten;
        trip|Reise f Reisen; game|Spiel n Spiels Spiele; break|Pause f Pausen; movie|Film m Films Filme""",
    "cause": """rain|Regen m Regens -; storm|Sturm m Sturms -; weather|Wetter n Wetters -; noise|Lärm m
        Lärms -; snow|Schnee m Schnees -; heat|Hitze f -; fog|Nebel m Nebels -""",
    "language": """German|Deutsch n Deutschs -; English|Englisch n Englischs -; French|Französisch n
        Französischs -; Spanish|Spanisch n Spanischs -; Italian|Italienisch n Italienischs -""",
}
GROUPS = {
    "people": "folk job kin",
    "person": "folk job kin",  # as an argument of a verb also names and pronouns, see argument()
    "things": "clothing item vessel device",
    "vehicle": "wheels transport",
    "place": "room home work nature",
}
CITIES = "Berlin|Berlin; Vienna|Wien; Munich|München; Rome|Rom; Paris|Paris; Italy|Italien; France|Frankreich"
NAMES = {"m": "Peter Paul Martin Robert David Leon", "f": "Anna Maria Julia Emma Laura Sophie"}

# English [comparative]|German [comparative]|noun classes
ADJECTIVE_TABLE = """big bigger|groß größer|animal things vehicle furniture place fruit snack; small
smaller|klein kleiner|animal things vehicle furniture place fruit snack; old older|alt älter|people animal
things vehicle place text furniture music; young younger|jung jünger|folk job animal; new newer|neu
neuer|things vehicle text music opening; red|rot|clothing wheels vessel apple tomato; blue|blau|clothing
vehicle vessel furniture opening; green|grün|clothing vehicle vessel opening; yellow|gelb|clothing vehicle
vessel; black|schwarz|clothing animal device wheels; white|weiß|clothing animal furniture opening wheels;
brown|braun|clothing animal furniture; gray|grau|clothing animal wheels; beautiful|schön|clothing place
music text; ugly|hässlich|clothing place furniture; good better|gut besser|text food drink job;
expensive|teuer|clothing item device vehicle music furniture; cheap cheaper|billig billiger|clothing device
wheels furniture wine beer; heavy heavier|schwer schwerer|vessel furniture device opening; long longer|lang
länger|text clothing event; short shorter|kurz kürzer|text event clothing; interesting|interessant|text
work event; boring|langweilig|text event; exciting|spannend|text event; funny|lustig|text folk;
important|wichtig|text event; famous|berühmt|job work home; friendly friendlier|freundlich
freundlicher|people; clever|klug|people animal; happy happier|glücklich glücklicher|people;
sad|traurig|people text; tired|müde|people animal; strong stronger|stark stärker|people animal;
lazy|faul|people animal; rich richer|reich reicher|folk kin job; poor poorer|arm ärmer|folk job;
sick|krank|people animal; polite|höflich|people; nervous|nervös|people; brave|mutig|people;
hungry|hungrig|people animal; curious|neugierig|people animal; angry|wütend|people; thirsty|durstig|people
animal; fast faster|schnell schneller|vehicle animal; slow slower|langsam langsamer|vehicle animal;
dangerous|gefährlich|animal; fresh|frisch|fruit snack food; sweet|süß|apple pear orange cherry
strawberry cake juice wine lemonade;
ripe|reif|apple pear banana tomato cherry orange strawberry; delicious|köstlich|fruit snack food drink; cold colder|kalt
kälter|drink; hot hotter|heiß heißer|water milk coffee tea soup; warm warmer|warm wärmer|drink clothing;
clean|sauber|clothing vessel room; dirty|schmutzig|clothing vessel room wheels; broken|kaputt|device
vehicle music opening; round|rund|furniture opening; empty|leer|vessel place; modern|modern|device work
furniture; quiet|ruhig|place; dark|dunkel|room opening clothing forest; wonderful|wunderbar|event nature text"""
STEMS = {"teuer": "teur", "dunkel": "dunkl", "müde": "müd"}

# english[/past/participle] [particle]|[prefix+]infinitive present past [*]participle|subjects|frames|flags; "*"
# asks for sein. Frames: - none, A accusative, D dative, DA both, to/at/from places, near/onto furniture, put A and
# onto, music, that, whether, inf, or english:german:case of a preposition. Flags: state (simple tenses, no
# adverbials), plain (no progressive), place/with/for (adjuncts), and groups of manner adverbs.
VERB_TABLE = """
sleep/slept/slept|schlafen schläft schlief geschlafen|person animal|-|place
sleep/slept/slept|schlafen schläft schlief geschlafen|dog cat|near|
work|arbeiten arbeitet arbeitete gearbeitet|person|-, at room work|with effort
laugh|lachen lacht lachte gelacht|person|-, about:über:A person text|voice
cry|weinen weint weinte geweint|person|-|voice
dance|tanzen tanzt tanzte getanzt|person|-|place with
sing/sang/sung|singen singt sang gesungen|person|-|place voice skill
swim/swam/swum|schwimmen schwimmt schwamm *geschwommen|person animal|-|pace skill with
cook|kochen kocht kochte gekocht|person|-|with skill
play|spielen spielt spielte gespielt|person|-, with:mit:D animal, music|place with
get/got/gotten up|auf+stehen steht stand *gestanden|person|-|pace
fall/fell/fallen asleep|ein+schlafen schläft schlief *geschlafen|person animal|-|pace
wake/woke/woken up|auf+wachen wacht wachte *gewacht|person animal|-|
shop|ein+kaufen kauft kaufte gekauft|person|-|with pace
arrive|an+kommen kommt kam *gekommen|person transport|-|
depart|ab+fahren fährt fuhr *gefahren|transport|-|
come/came/come back|zurück+kommen kommt kam *gekommen|person|-|
go/went/gone out|aus+gehen geht ging *gegangen|person|-|with
travel|reisen reist reiste *gereist|person|to city|with
fly/flew/flown|fliegen fliegt flog *geflogen|person|to city|with
go/went/gone|gehen geht ging *gegangen|person|to place practice, to practice|with
drive/drove/driven|fahren fährt fuhr *gefahren|person|to home work city, to practice|with pace
run/ran/run|laufen läuft lief *gelaufen|person animal|to room nature, through:durch:A park forest garden|pace
come/came/come|kommen kommt kam *gekommen|person|from place, from practice|
stroll|spazieren spaziert spazierte *spaziert|person|through:durch:A park forest garden village|with
hike|wandern wandert wanderte *gewandert|person|around:um:A lake forest, through:durch:A forest village city|with
live|wohnen wohnt wohnte gewohnt|person|at home city|state
sit/sat/sat|sitzen sitzt saß gesessen|person|at nature room, on:auf:D bench sofa chair bed|
sit/sat/sat|sitzen sitzt saß gesessen|dog cat bird mouse monkey|near|
stay|bleiben bleibt blieb *geblieben|person|at home nature room|with
stand/stood/stood|stehen steht stand gestanden|vessel device|near|
lie/lay/lain|liegen liegt lag gelegen|dog cat item clothing text|near|
jump|springen springt sprang *gesprungen|cat dog monkey goat|onto furniture|
put/put/put|legen legt legte gelegt|person|put item clothing text|care
place|stellen stellt stellte gestellt|person|put vessel device|care
hide/hid/hidden|verstecken versteckt versteckte versteckt|person|A item snack text|place
wait|warten wartet wartete gewartet|person|-, for:auf:A person transport|place patience
dream|träumen träumt träumte geträumt|person|of:von:D wheels animal home person|
think/thought/thought|denken denkt dachte gedacht|person|of:an:A person event, that|
talk|reden redet redete geredet|person|about:über:A event text person, with:mit:D person|voice
look|auf+passen passt passte gepasst|person|after:auf:A folk kin animal|
take/took/taken part|teil+nehmen nimmt nahm genommen|person|in:an:D concert exam party meeting game lesson|
fight/fought/fought|kämpfen kämpft kämpfte gekämpft|person|against:gegen:A lion bear king soldier|
buy/bought/bought|kaufen kauft kaufte gekauft|person|A fruit snack food drink text things vehicle music|for
sell/sold/sold|verkaufen verkauft verkaufte verkauft|person|A fruit snack food drink things vehicle animal|
eat/ate/eaten|essen isst aß gegessen|person|A fruit snack, A fruit, A food|place pace with
drink/drank/drunk|trinken trinkt trank getrunken|person|A drink, A drink, A water milk coffee tea|place pace with
order|bestellen bestellt bestellte bestellt|person|A food drink snack, A drink soup|for
bake|backen backt backte gebacken|person|A snack bread|for
taste|probieren probiert probierte probiert|person|A food drink snack|care
pick|pflücken pflückt pflückte gepflückt|person|A apple pear cherry orange strawberry|pace patience
peel|schälen schält schälte geschält|person|A apple pear orange potato carrot banana tomato|care
cut/cut/cut|schneiden schneidet schnitt geschnitten|person|A fruit bread cheese meat ham cake sausage pizza|care
read/read/read|lesen liest las gelesen|person|A text, A text|place patience
write/wrote/written|schreiben schreibt schrieb geschrieben|person|A letter postcard story poem novel, DA letter|
find/found/found|finden findet fand gefunden|person|A item clothing text animal|plain place
look for|suchen sucht suchte gesucht|person|A item clothing text animal person|place patience
lose/lost/lost|verlieren verliert verlor verloren|person|A item clothing|plain place
forget/forgot/forgotten|vergessen vergisst vergaß vergessen|person|A item clothing text event, inf|plain
wash|waschen wäscht wusch gewaschen|person|A clothing vessel wheels animal fruit|care
repair|reparieren repariert reparierte repariert|person|A device vehicle furniture music opening|care patience
carry|tragen trägt trug getragen|person|A vessel furniture music|care
wear/wore/worn|tragen trägt trug getragen|person|A clothing|
put/put/put on|an+ziehen zieht zog gezogen|person|A clothing|pace
take/took/taken off|aus+ziehen zieht zog gezogen|person|A clothing|pace
draw/drew/drawn|zeichnen zeichnet zeichnete gezeichnet|person|A animal place furniture|patience
build/built/built|bauen baut baute gebaut|person|A home bridge boat ship furniture factory|for
paint|streichen streicht strich gestrichen|person|A furniture opening room house|care
open|auf+machen macht machte gemacht|person|A opening box bottle suitcase letter|care pace
close|zu+machen macht machte gemacht|person|A opening box suitcase|care pace
turn on|ein+schalten schaltet schaltete geschaltet|person|A computer radio lamp television|
turn off|aus+schalten schaltet schaltete geschaltet|person|A computer radio lamp television|
clean up|auf+räumen räumt räumte geräumt|person|A room desk cupboard drawer|pace care
throw/threw/thrown away|weg+werfen wirft warf geworfen|person|A text clothing vessel item|
bring/brought/brought along|mit+bringen bringt brachte gebracht|person|A food drink text snack music|
steal/stole/stolen|stehlen stiehlt stahl gestohlen|person|A item vehicle device fruit|
see/saw/seen|sehen sieht sah gesehen|person animal|A person animal vehicle nature|plain place
hear/heard/heard|hören hört hörte gehört|person animal|A person animal rain storm|plain
feed/fed/fed|füttern füttert fütterte gefüttert|person|A animal|place care
catch/caught/caught|fangen fängt fing gefangen|cat dog fox person|A mouse bird duck rabbit|
speak/spoke/spoken|sprechen spricht sprach gesprochen|person|A language, with:mit:D person|skill
learn|lernen lernt lernte gelernt|person|A language, A language|pace
understand/understood/understood|verstehen versteht verstand verstanden|person|A language person text|state
visit|besuchen besucht besuchte besucht|person|A person, A castle museum zoo village|
meet/met/met|treffen trifft traf getroffen|person|A person|place
call|an+rufen ruft rief gerufen|person|A person|
invite|ein+laden lädt lud geladen|person|A person|
pick up|ab+holen holt holte geholt|person|A person|
greet|grüßen grüßt grüßte gegrüßt|person|A person|
hug|umarmen umarmt umarmte umarmt|person|A kin child girl boy person|
ask|fragen fragt fragte gefragt|person|A person, whether|
admire|bewundern bewundert bewunderte bewundert|person|A job castle person|
know/knew/known|kennen kennt kannte gekannt|person|A person text|state
know/knew/known|wissen weiß wusste gewusst|person|that, whether|state
love|lieben liebt liebte geliebt|person|A person animal nature|state
like|mögen mag mochte gemocht|person|A fruit snack food drink person, A animal music|state
hate|hassen hasst hasste gehasst|person|A fruit rain snow noise meat cheese heat|state
have/had/had|haben hat hatte gehabt|person|A animal things vehicle music furniture|state
need|brauchen braucht brauchte gebraucht|person|A things vehicle text drink music|state
help|helfen hilft half geholfen|person|D person, D person|place patience
thank|danken dankt dankte gedankt|person|D person|
follow|folgen folgt folgte *gefolgt|person animal|D person, D animal|
answer|antworten antwortet antwortete geantwortet|person|D person|
listen to|zu+hören hört hörte gehört|person|D person|
trust|vertrauen vertraut vertraute vertraut|person|D person|state
belong|gehören gehört gehörte gehört|things vehicle music animal|to::D person|state
give/gave/given|geben gibt gab gegeben|person|DA item text fruit snack|
show/showed/shown|zeigen zeigt zeigte gezeigt|person|DA item text clothing place|
send/sent/sent|schicken schickt schickte geschickt|person|DA text photo picture|
bring/brought/brought|bringen bringt brachte gebracht|person|DA vessel text item drink|
lend/lent/lent|leihen leiht lieh geliehen|person|DA text item wheels device|
tell/told/told|erzählen erzählt erzählte erzählt|person|DA story|
say/said/said|sagen sagt sagte gesagt|person|that|
believe|glauben glaubt glaubte geglaubt|person|that, D person|state
hope|hoffen hofft hoffte gehofft|person|that, inf|
try|versuchen versucht versuchte versucht|person|inf|
begin/began/begun|beginnen beginnt begann begonnen|person|inf|plain
plan|planen plant plante geplant|person|inf|
promise|versprechen verspricht versprach versprochen|person|inf|plain
be/was/been|sein ist war *gewesen|||
cost/cost/cost|kosten kostet kostete gekostet|||"""

# english|german|tenses (s simple, g progressive, p past, x perfect, f future, m modal, b with "be", * any)|positions
# (f front, c front with an English comma, m middle, e end)
ADVERBS = """every day|jeden Tag|sp|fe; every week|jede Woche|s|fe; on weekends|am Wochenende|s|fe;
often|oft|spxb|m; usually|normalerweise|sb|m; sometimes|manchmal|spb|mf; always|immer|spb|m;
rarely|selten|spxb|m; now|jetzt|gmb|fe; today|heute|gfmb|fe; at the moment|in dem Moment|gb|fe;
yesterday|gestern|p|fe; last week|letzte Woche|p|fe; last year|letztes Jahr|p|fe; last night|letzte
Nacht|p|fe; in the morning|an dem Morgen|spf|fe; in the evening|an dem Abend|spfm|fe; in the afternoon|an
dem Nachmittag|spfm|fe; at night|nachts|sp|fe; tomorrow|morgen|fm|fe; next week|nächste Woche|fm|fe; next
year|nächstes Jahr|f|fe; soon|bald|fm|fe; later|später|fm|e; already|schon|x|m; already|schon|x|m;
just|gerade|x|m; recently|kürzlich|x|m; again|wieder|gpf|e; still|immer noch|gb|m; unfortunately|leider|*|c;
fortunately|glücklicherweise|*|c; of course|natürlich|*|c; perhaps|vielleicht|*|f; in spring|im
Frühling|spf|fe; in summer|im Sommer|spf|fe; in autumn|im Herbst|spf|fe; in winter|im Winter|spf|fe"""
MANNERS = """quickly|schnell|pace; slowly|langsam|pace; carefully|vorsichtig|care;
patiently|geduldig|patience; diligently|fleißig|effort; loudly|laut|voice; quietly|leise|voice;
well|gut|skill; badly|schlecht|skill"""
SURFACES = "on|auf; under|unter; next to|neben; behind|hinter; in front of|vor"
OCCASIONS = """after|nach|D|event; before|vor|D|event; during|während|G|event; because of|wegen|G|cause;
despite|trotz|G|cause"""
COMPANY = "with|mit|D|with; without|ohne|A|with; for|für|A|for"
INHABITANTS = "furniture vessel|room; animal|nature; job|work; work castle hotel|city"
CONJUNCTIONS = "because|weil|*; although|obwohl|*; while|während|*; when|wenn|n; when|als|p; if|wenn|n"
WEEKDAYS = """Monday|Montag; Tuesday|Dienstag; Wednesday|Mittwoch; Thursday|Donnerstag; Friday|Freitag;
Saturday|Samstag; Sunday|Sonntag"""
UNITS = "days|Tagen; weeks|Wochen; months|Monaten; years|Jahren"
NUMBERS = """two|zwei; three|drei; four|vier; five|fünf; six|sechs; seven|sieben; eight|acht; nine|neun;
ten|zehn; eleven|elf; twelve|zwölf; thirteen|dreizehn; fourteen|vierzehn; fifteen|fünfzehn;
sixteen|sechzehn; seventeen|siebzehn; eighteen|achtzehn; nineteen|neunzehn"""
TENS = """twenty|zwanzig; thirty|dreißig; forty|vierzig; fifty|fünfzig; sixty|sechzig; seventy|siebzig;
eighty|achtzig; ninety|neunzig"""

# English subject and object|German nominative, accusative, dative|person|agreement (ich, du, er, plural)
PRONOUNS = """I me|ich mich mir|1|0; you you|du dich dir|2|1; he him|er ihn ihm|3|2; she her|sie sie
ihr|3|2; we us|wir uns uns|1|3; they them|sie sie ihnen|3|3"""
IRREGULAR_PRESENT = """sein|bin bist ist sind; haben|habe hast hat haben; werden|werde wirst wird werden;
wissen|weiß weißt weiß wissen; mögen|mag magst mag mögen"""
MODALS = """can|kann kannst kann können; must|muss musst muss müssen; may|darf darfst darf dürfen;
should|sollte solltest sollte sollten; could|konnte konntest konnte konnten;
would like to|möchte möchtest möchte möchten; want to|will willst will wollen;
have to|muss musst muss müssen; wanted to|wollte wolltest wollte wollten;
had to|musste musstest musste mussten"""

# Articles and endings by case for masculine, feminine, neuter and plural; "_" is no ending.
ARTICLES = {"N": "der die das die", "A": "den die das die", "D": "dem der dem den", "G": "des der des der"}
STRONG = {"N": "er e es e", "A": "en e es e", "D": "em er em en", "G": "es er es er"}
EIN = {**STRONG, "N": "_ e _ e", "A": "en e _ e"}
WEAK = {"N": "e e e en", "A": "en e e en", "D": "en en en en", "G": "en en en en"}
MIXED = {**WEAK, "N": "er e es en", "A": "en e es en"}
NO_ARTICLE = {**STRONG, "G": "en er en er"}
RELATIVES = {"N": "der die das die", "A": "den die das die", "D": "dem der dem denen"}
DER_WORDS = {"this": "dies", "these": "dies", "every": "jed", "which": "welch"}
QUANTIFIERS = {"some": "einig", "many": "viel"}
POSSESSIVE_TABLE = "my|mein; your|dein; his|sein; her|ihr; our|unser; their|ihr"
CONTRACTION_TABLE = """in dem|im; in das|ins; an dem|am; an das|ans; zu dem|zum; zu der|zur; bei dem|beim;
von dem|vom"""

# Determiners, repeated by frequency; "+" asks for a plural, "0" for no determiner.
SUBJECT = "the the the the the the the the the the+ the+ the+ a a a a this these+ every my my my+ some+ many+ number+"
OBJECT = SUBJECT + " 0+ 0+ number+ a a"
NOT_OBJECT = "the the the the the+ this my no no no+"  # "no" is the German half of an English "not a"
NEVER_OBJECT = "the the my a a 0+"
DEFINITE = "the the the the+ this these+ my my+"
LOCAL = "the the the the the the the a this"
MASS = "0 0 0 0 the the the my"
NOT_MASS = "no the"
NO_BARE = " ".join(o for o in OBJECT.split() if o != "0+")  # "gives her apples" has two readings
UNOWNED = ("folk", "job", "room", "work", "nature", "opening", "transport", "event")  # never "my king"
OWNED = ("animal", "text", "clothing", "item", "vessel", "device", "wheels", "music", "home")  # "the king's dog"
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "gray")
STATES = ("happy", "sad", "tired", "sick", "nervous", "hungry", "thirsty", "angry", "curious")
TENSES = (*("simple",) * 3, *("progressive",) * 2, *("past",) * 4, *("perfect",) * 2, "future", "modal", "modal")
CODES = {"simple": "s", "progressive": "g", "past": "p", "perfect": "x", "future": "f"}
TEENS, ADULT = tuple(range(13, 20)) * 14, (*range(20, 100), *tuple(range(20, 100, 10)) * 4)
NOW, THEN = ("simple", "progressive"), ("past",)


class Noun(NamedTuple):
    """A noun of both languages; places also have an English preposition and two German ones."""

    english: str
    english_plural: str
    german: str
    gender: str
    genitive: str
    plural: str
    kind: str
    prepositions: str


class Adjective(NamedTuple):
    """An adjective, perhaps with its comparative, and the nouns that it suits."""

    english: str
    german: str
    nouns: str


class Verb(NamedTuple):
    """A verb of both languages with one frame and the nouns that may fill it."""

    base: str
    past: str
    participle: str
    particle: str
    prefix: str
    infinitive: str
    present: str
    preterite: str
    german_participle: str
    subjects: str
    frame: str
    objects: str
    flags: str


@functools.cache
def rows(table: str) -> list[list[str]]:
    """The cells of a table whose rows end in semicolons."""
    return [[cell.strip() for cell in " ".join(row.split()).split("|")] for row in table.split(";")]


def mapping(table: str) -> dict[str, str]:
    """A table of two columns."""
    return {key: value for key, value in rows(table)}


def with_ending(word: str, ending: str) -> str:
    """An English word with a regular -s, -ed or -ing."""
    if ending == "s":
        ending = "es" if re.search(r"(s|sh|ch|x|ato|go|do)$", word) else ending
        return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + ending
    if ending == "ed" and re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ied"
    if ending == "ing" and word.endswith("ie"):
        return word[:-2] + "ying"
    if re.search(r"[^e]e$", word):
        return word[:-1] + ending
    doubles = re.match(r"^[^aeiou]*[aeiou][bdgmnpt]$", word) or word in ("begin", "forget")
    return word + word[-1] * bool(doubles) + ending


def parse_nouns() -> Iterator[Noun]:
    """Read the noun table."""
    for kind, table in NOUN_TABLE.items():
        for english, forms, *places in rows(table):
            singular, _, plural = english.partition("/")
            plural = plural or with_ending(singular, "s")
            german, gender, *genitive, german_plural = forms.split()
            genitive = genitive or [german]
            yield Noun._make([singular, plural, german, gender, *genitive, german_plural, kind, "".join(places)])


def parse_verbs() -> Iterator[Verb]:
    """Read the verb table into one entry for each verb and frame."""
    for row in VERB_TABLE.strip().splitlines():
        english, german, subjects, frames, flags = row.split("|")
        forms, _, particle = english.partition(" ")
        base, *irregular = forms.split("/")
        irregular = irregular or [with_ending(base, "ed")] * 2
        prefixed, *german_forms = german.split()
        prefix, _, infinitive = prefixed.rpartition("+")
        for frame in frames.split(","):
            kind, _, nouns = frame.strip().partition(" ")
            english_forms = [base, *irregular, particle]
            yield Verb._make([*english_forms, prefix, infinitive, *german_forms, subjects, kind, nouns, flags])


NOUNS = tuple(parse_nouns())
ADJECTIVES = tuple(Adjective(*row) for row in rows(ADJECTIVE_TABLE))
VERBS = tuple(parse_verbs())
*_, BE, COST = VERBS
GERMAN_PRESENT, GERMAN_MODALS = mapping(IRREGULAR_PRESENT), mapping(MODALS)
EIN_WORDS = {"a": "ein", "no": "kein", **mapping(POSSESSIVE_TABLE)}
POSSESSIVES, CONTRACTIONS = list(mapping(POSSESSIVE_TABLE)), mapping(CONTRACTION_TABLE)
PLAIN = tuple(v for v in VERBS if v.frame not in ("", "that", "whether", "inf"))
ACTIVE = tuple(v for v in PLAIN if "state" not in v.flags)
PERSONAL = tuple(v for v in PLAIN if "person" in v.subjects)
DEEDS = tuple(v for v in ACTIVE if "person" in v.subjects)


@functools.cache
def members(classes: str) -> tuple[Noun, ...]:
    """The nouns of some classes, groups of classes or single words."""
    expanded = " ".join(GROUPS.get(name, name) for name in classes.split()).split()
    return tuple(n for name in expanded for n in NOUNS if name == (n.kind if name in NOUN_TABLE else n.english))


@functools.cache
def adjectives_for(noun: Noun) -> tuple[Adjective, ...]:
    """The adjectives that suit a noun."""
    return tuple(a for a in ADJECTIVES if noun in members(a.nouns))


# ---------------------------------------------------------------------------------------------------
# Noun phrases and places.


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: its English words, and its German words for each case."""

    english: Tokens
    german: Callable[[str], Tokens]
    agreement: int = 2  # ich, du, er or plural
    gender: str = "m"  # or f, n, p
    person: int = 3
    objective: Tokens = ()  # the English words of a pronoun as an object
    indefinite: bool = False
    noun: Noun | None = None

    @property
    def object(self) -> Tokens:
        """The English words after a verb or a preposition."""
        return self.objective or self.english


def cell(table: dict[str, str], case: str, gender: str) -> str:
    """The form of an article or ending for a case and a gender."""
    return table[case].split()["mfnp".index(gender)].strip("_")


def decline(noun: Noun, gender: str, case: str) -> str:
    """A German noun in a case; a masculine genitive in -n is the form of all cases but the nominative."""
    if gender == "p":
        return noun.plural + ("n" if case == "D" and noun.plural[-1] not in "ns" else "")
    weak = noun.gender == "m" and noun.genitive.endswith("n")
    return noun.genitive if case == "G" or (weak and case != "N") else noun.german


def determine(determiner: str, gender: str, case: str) -> tuple[str, str]:
    """A German determiner, empty where German has none, and the ending of the adjectives after it."""
    if determiner == "the":
        return cell(ARTICLES, case, gender), cell(WEAK, case, gender)
    if determiner in DER_WORDS:
        return DER_WORDS[determiner] + cell(STRONG, case, gender), cell(WEAK, case, gender)
    if determiner in EIN_WORDS:
        return EIN_WORDS[determiner] + cell(EIN, case, gender), cell(MIXED, case, gender)
    ending = cell(NO_ARTICLE, case, gender)
    return QUANTIFIERS[determiner] + ending if determiner in QUANTIFIERS else "", ending


def number_words(number: int) -> Sides:
    """A number from two to ninety-nine."""
    if number < 20:
        return align(*rows(NUMBERS)[number - 2])
    (english, german), ones = rows(TENS)[number // 10 - 2], number % 10
    unit, einheit = [["", ""], ["one", "ein"], *rows(NUMBERS)][ones]
    return align(f"{english}-{unit}", f"{einheit}und{german}") if ones else align(english, german)


def count(dice: Dice, large: float = 0.15) -> Sides:
    """A number up to twelve, or with the given probability up to ninety-nine."""
    return number_words(dice.pick(TEENS + ADULT) if dice.chance(large) else 2 + int(dice.random() * 11))


def build(noun: Noun, determiner: str, plural: bool = False, extras: Sequence[Sides] = (), not_key: int = 0) -> Phrase:
    """Put a noun phrase together; a not_key makes its article the "kein" of an English "not a"."""
    gender, key, noun_key = "p" if plural else noun.gender, not_key or new_key(), new_key()
    bare = determiner in ("0", "number") or (not_key and (plural or noun.plural == "-"))
    article = () if bare else tokens("a" if not_key else determiner, key)
    (before, davor) = joined(extras)
    english = (*article, *before, Token(noun.english_plural if plural else noun.english, (noun_key,)))

    def german(case: str) -> Tokens:
        form, ending = determine("no" if not_key else determiner, gender, case)
        inflected = (t._replace(text=t.text.replace("~", ending)) for t in davor)
        return (*tokens(form, key), *inflected, Token(decline(noun, gender, case), (noun_key,)))

    indefinite = bool(not_key) or determiner in ("0", "a", "some", "many", "number", "every")
    return Phrase(english, german, 3 if plural else 2, gender, indefinite=indefinite, noun=noun)


def attribute(adjective: Adjective) -> Sides:
    """An adjective in front of a noun; "~" stands for the German ending."""
    german = adjective.german.split()[0]
    return align(adjective.english.split()[0], STEMS.get(german, german) + "~")


@functools.cache
def determiners(noun: Noun, options: str) -> list[str]:
    """The options that suit a noun, repeated by frequency."""
    if noun.kind in ("food", "drink", "language"):
        options = NOT_MASS if options == NOT_OBJECT else "the my" if options == NO_BARE else MASS
    elif noun.plural == "-" and noun.kind != "kin":
        return ["the"]
    if noun.kind == "kin":
        options = "my" if noun.plural == "-" or options == "the" else "my my my my+"
    if noun.kind == "language":
        options = options.split()[0]
    return [o for o in options.split() if not (o.startswith("my") and noun.kind in UNOWNED)]


def noun_phrase(dice: Dice, noun: Noun, options: str, describe: float = 0.3, not_key: int = 0) -> Phrase:
    """A phrase around a noun with one of the determiners, now and then with adjectives or an owner."""
    choice = dice.pick(determiners(noun, options))
    determiner, plural, fitting = choice.rstrip("+"), choice.endswith("+"), adjectives_for(noun)
    extras = [dice.pick(fitting)] if fitting and dice.chance(describe) else []
    if extras and extras[0].english in COLORS and ADJECTIVES[0] in fitting and dice.chance(0.4):
        extras = [dice.pick(ADJECTIVES[:2]), *extras]
    adjectives = [attribute(a) for a in extras]
    if determiner == "the" and noun.kind in OWNED and dice.chance(0.1):
        return owned(dice, noun, plural, adjectives)
    number = [count(dice)] if determiner == "number" else []
    determiner = dice.pick(POSSESSIVES) if determiner == "my" else determiner
    return build(noun, determiner, plural, number + adjectives, not_key if determiner == "no" else 0)


def owned(dice: Dice, noun: Noun, plural: bool, adjectives: Sequence[Sides]) -> Phrase:
    """Somebody's thing: a name precedes it in both languages, a noun follows it as a German genitive."""
    named = dice.chance(0.4)
    thing = build(noun, "0" if named else "the", plural, adjectives)
    owner = name(dice) if named else noun_phrase(dice, dice.pick(members("people")), "the")
    *front, last = owner.english

    def german(case: str) -> Tokens:
        if named:
            return (Token(last.text + "s", last.keys), *thing.german(case))
        return thing.german(case) + owner.german("G")

    english = (*front, Token(last.text + "'s", last.keys), *thing.english[not named :])
    return replace(thing, english=english, german=german, indefinite=False)


def name(dice: Dice) -> Phrase:
    """Somebody's first name."""
    gender = dice.pick("mf")
    english, german = align(*[dice.pick(NAMES[gender].split())] * 2)
    return Phrase(english, lambda case: german, gender=gender)


def pronoun(row: Sequence[str]) -> Phrase:
    """A personal pronoun from its row in the table."""
    key = new_key()
    subject, objective = (tokens(word, key) for word in row[0].split())
    forms = dict(zip("NAD", row[1].split(), strict=True))
    return Phrase(subject, lambda case: tokens(forms[case], key), int(row[3]), person=int(row[2]), objective=objective)


def argument(dice: Dice, classes: str, options: str, subject: Phrase | None = None, describe: float = 0.3) -> Phrase:
    """A phrase for a slot in a verb's frame; no object repeats a subject in the first or second person."""
    if "person" in classes.split() and dice.chance(0.35):
        if dice.chance(0.35):
            return name(dice)
        taken = subject.person if subject and subject.person < 3 else 0
        return pronoun(dice.pick([row for row in rows(PRONOUNS) if int(row[2]) != taken]))
    return noun_phrase(dice, dice.pick(members(classes)), options, describe)


def with_preposition(english: str, german: str, case: str, phrase: Phrase) -> Sides:
    """A prepositional phrase."""
    return joined([align(english, german), (phrase.object, phrase.german(case))])


def place(dice: Dice, classes: str, relation: str) -> Sides:
    """A phrase of location (at), direction (to) or origin (from)."""
    if "city" in classes.split() and dice.chance(0.6):
        prepositions = {"at": ("in", "in"), "to": ("to", "nach"), "from": ("from", "aus")}[relation]
        return joined([align(*prepositions), align(*dice.pick(rows(CITIES)))])
    noun = dice.pick(members(classes))
    phrase = noun_phrase(dice, noun, LOCAL)
    location, german_location, direction = noun.prepositions.split()
    if relation == "at":
        return with_preposition(location, german_location, "D", phrase)
    if relation == "from":
        return with_preposition("from", "aus" if german_location == "in" else "von", "D", phrase)
    return with_preposition("to", direction, "D" if direction == "zu" else "A", phrase)


def surface(dice: Dice, case: str) -> Sides:
    """A phrase of location (dative) or direction (accusative) on, under or near a piece of furniture."""
    english, german = dice.pick(rows(SURFACES))
    return with_preposition(english, german, case, noun_phrase(dice, dice.pick(members("furniture")), LOCAL))


# ---------------------------------------------------------------------------------------------------
# Adverbials. English puts them in front, before the verb or at the end; German in front or in the middle.


class Adverb(NamedTuple):
    """An adverbial and its English spot: f (front), c (front with a comma), m (middle) or e (end)."""

    english: Tokens
    german: Tokens
    spot: str


def occasion(dice: Dice) -> Sides:
    """A phrase about an event or a cause."""
    english, german, case, kind = dice.pick(rows(OCCASIONS))
    return with_preposition(english, german, case, noun_phrase(dice, dice.pick(members(kind)), "the"))


def moment(dice: Dice, code: str) -> Sides:
    """A span of time that has passed, a day of the week, an hour, or both."""
    if code == "p" and dice.chance(0.4):
        (number, zahl), (unit, einheit), (ago, vor) = count(dice), align(*dice.pick(rows(UNITS))), align("ago", "vor")
        return number + unit + ago, vor + zahl + einheit
    hour = joined([align("at", "um"), count(dice, 0), align("o'clock", "Uhr")])
    if code == "s" or dice.chance(0.25):
        return hour
    day, tag = dice.pick(rows(WEEKDAYS))
    date = align(f"on {day}", f"am {tag}")
    return joined([date, hour]) if dice.chance(0.3) else date


def adverbial(dice: Dice, code: str, spots: str) -> Adverb | None:
    """A random adverbial for a tense, if it fits a free spot."""
    if code in tuple("spfm") and dice.chance(0.42):
        dated = dice.chance(0.6)
        sides, spot = moment(dice, code) if dated else occasion(dice), dice.pick("ef" if dated else "ec")
    else:
        english, german, _, places = dice.pick([row for row in rows(ADVERBS) if code in row[2] or row[2] == "*"])
        sides, spot = align(english, german), dice.pick(places)
    return Adverb(*sides, spot) if spot in spots else None


# ---------------------------------------------------------------------------------------------------
# Clauses.


class Body(NamedTuple):
    """The dependents of the verb: in English in sequence, in German by slots of the middle field."""

    english: Tokens = ()
    light: Tokens = ()  # pronouns
    dative: Tokens = ()  # the receiver of a direct object
    manner: Tokens = ()
    object: Tokens = ()
    tail: Tokens = ()  # adjuncts, prepositional phrases and predicatives, which "nicht" precedes
    loose: bool = False  # the object is indefinite


@dataclass(frozen=True)
class Clause:
    """The parts of a clause before either language orders them."""

    subject: Phrase
    verb: Verb
    tense: str  # simple, progressive, past, perfect, future or a modal
    body: Body
    key: int
    adverb: Adverb | None = None
    negation: str = ""  # not, never, or "no" for a "not" that German expresses by "kein"
    not_key: int = 0
    aux_key: int = 0


def complement(dice: Dice, verb: Verb, subject: Phrase, key: int, choose: Callable[[], Phrase | None]) -> Body:
    """Fill a verb's frame; choose gives its object, or None to leave a gap."""
    particle = tokens(verb.particle, key)
    match verb.frame.split(":"):
        case ["at" | "to" | "from" as relation]:
            english, tail = place(dice, verb.objects, relation)
        case ["near"]:
            english, tail = surface(dice, "D")
        case ["onto"]:
            target = noun_phrase(dice, dice.pick(members(verb.objects)), LOCAL)
            english, tail = with_preposition("onto", "auf", "A", target)
        case ["music"]:
            english, tail = align(*dice.pick([(f"the {n.english}", n.german) for n in members("music")]))
        case [preposition, german, case] if thing := choose():
            english, tail = with_preposition(preposition, german, case, thing)
        case ["A" | "D" | "DA" | "put"] if thing := choose():
            return objects(dice, verb, subject, particle, thing)
        case _:
            english, tail = (), ()
    return Body(particle + english, tail=tail)


def objects(dice: Dice, verb: Verb, subject: Phrase, particle: Tokens, thing: Phrase) -> Body:
    """The objects of a transitive, dative or ditransitive verb."""
    german = thing.german("D" if verb.frame == "D" else "A")
    if thing.objective:
        return Body(thing.object + particle if verb.particle == "up" else particle + thing.object, light=german)
    body = Body(particle + thing.object, object=german, loose=thing.indefinite)
    if verb.frame == "put":
        target, tail = surface(dice, "A")
        return body._replace(english=body.english + target, tail=tail)
    if verb.frame == "DA":
        receiver = argument(dice, "person", DEFINITE, subject)
        body = body._replace(english=receiver.object + body.english)
        dative = receiver.german("D")
        return body._replace(light=dative) if receiver.objective else body._replace(dative=dative)
    return body


def adjunct(dice: Dice, verb: Verb, body: Body, subject: Phrase) -> Body:
    """Add the place, the company, the beneficiary or the manner that the verb allows."""
    flag = dice.pick(verb.flags.split())
    if flag == "plain" or (flag == "with" and verb.frame.startswith("with")):
        return body
    if flag in [row[2] for row in rows(MANNERS)]:
        english, german = align(*dice.pick([row[:2] for row in rows(MANNERS) if row[2] == flag]))
        early = body.tail and not body.object  # "runs quickly to the lake", but "eats the apple quickly"
        return body._replace(english=english + body.english if early else body.english + english, manner=german)
    if flag == "place":
        english, german = place(dice, "room work nature", "at")
    else:
        preposition, präposition, case = dice.pick([row[:3] for row in rows(COMPANY) if row[3] == flag])
        english, german = with_preposition(preposition, präposition, case, argument(dice, "person", DEFINITE, subject))
    return body._replace(english=body.english + english, tail=german + body.tail)


def fits(verb: Verb, subject: Phrase, tense: str) -> bool:
    """Whether a clause in this tense is idiomatic, and its English shows the tense."""
    if tense in ("simple", "past") and verb.past == verb.base and subject.agreement != 2:
        return False  # "they read" could be present or past
    if tense == "past":
        return subject.agreement != 1  # "du kauftest" is bookish
    if "state" in verb.flags:
        return tense == "simple"
    if tense == "progressive":
        return "plain" not in verb.flags
    return tense not in GERMAN_MODALS or "person" in verb.subjects


def object_options(verb: Verb, negation: str) -> str:
    """The determiners that an object may have."""
    if verb.frame in ("A", "put") and negation:
        return NOT_OBJECT if negation == "not" else NEVER_OBJECT
    if verb.frame == "D" or negation == "not":
        return DEFINITE
    return NO_BARE if verb.frame == "DA" else LOCAL if verb.frame.startswith(("through", "around")) else OBJECT


def clause(
    dice: Dice,
    subject: Phrase | None = None,
    tenses: Sequence[str] = TENSES,
    verbs: Sequence[Verb] = PLAIN,
    *,
    given: Phrase | None = None,
    gap: bool = False,
    negate: float = 0.16,
    time: float = 0.6,
    spots: str = "fcme",
) -> Clause:
    """A random clause with the given parts and options."""
    verb, tense = dice.pick(verbs), dice.pick(tenses)
    tense = dice.pick(list(GERMAN_MODALS)) if tense == "modal" else tense
    who = subject or argument(dice, verb.subjects, SUBJECT)
    if not fits(verb, who, tense):
        return clause(dice, subject, tenses, verbs, given=given, gap=gap, negate=negate, time=time, spots=spots)
    key, not_key, state, negation = new_key(), new_key(), "state" in verb.flags, ""
    if not who.indefinite and tense != "must" and verb.frame not in ("DA", "music") and dice.chance(negate):
        negation = "never" if tense in ("simple", "perfect") and not state and dice.chance(0.3) else "not"
    options = object_options(verb, negation)

    def choose() -> Phrase | None:
        if gap or given:
            return given
        if options == NOT_OBJECT:
            return noun_phrase(dice, dice.pick(members(verb.objects)), options, not_key=not_key)
        return argument(dice, verb.objects, options, who)

    body, adverb = complement(dice, verb, who, key, choose), None
    if verb.flags and not state and not negation and dice.chance(0.35):
        body = adjunct(dice, verb, body, who)
    if not state and negation != "never" and dice.chance(time):
        adverb = adverbial(dice, CODES.get(tense, "m"), spots.strip("me") if negation else spots)
    negation = "no" if negation == "not" and body.loose else negation
    return Clause(who, verb, tense, body, key, adverb, negation, not_key, new_key())


def english_finite(base: str, past: str, c: Clause, key: int, support: bool, is_past: bool) -> Sides:
    """An auxiliary and a full verb: "does buy" where support is asked for, else "buys"."""
    third = c.subject.agreement == 2 and not is_past
    if support:
        return tokens("did" if is_past else "does" if third else "do", key), tokens(base, key)
    present = "has" if base == "have" else with_ending(base, "s")
    return (), tokens(past if is_past else present if third else base, key)


def english_verb(c: Clause, support: bool) -> tuple[Tokens, Tokens]:
    """The English auxiliary, if any, and the rest of the verb."""
    verb, agreement = c.verb, c.subject.agreement
    if c.tense == "progressive" or verb is BE:
        be = ("was were was were" if c.tense == "past" else "am are is are").split()[agreement]
        return tokens(be, c.key), tokens("" if verb is BE else with_ending(verb.base, "ing"), c.key)
    if c.tense in ("simple", "past"):
        return english_finite(verb.base, verb.past, c, c.key, support, c.tense == "past")
    if c.tense == "perfect":
        return tokens("has" if agreement == 2 else "have", c.aux_key), tokens(verb.participle, c.key)
    infinitive = tokens(verb.base, c.key)
    if c.tense in ("want to", "wanted to", "have to", "had to"):
        base, past = ("want", "wanted") if c.tense.startswith("want") else ("have", "had")
        auxiliary, rest = english_finite(base, past, c, c.aux_key, support, c.tense.startswith(past))
        return auxiliary, rest + tokens("to", c.aux_key) + infinitive
    first, *others = tokens("will" if c.tense == "future" else c.tense, c.aux_key)
    return (first,), (*others, *infinitive)


def english(c: Clause, question: Tokens | None = None) -> Tokens:
    """Order an English statement, or a question after its question word."""
    auxiliary, rest = english_verb(c, c.negation in ("not", "no") or question is not None)
    adverb, spot = (c.adverb.english, c.adverb.spot) if c.adverb else ((), "")
    negator = tokens("not" if c.negation == "no" else c.negation, c.not_key)
    middle = negator + (adverb if spot == "m" else ()) + rest
    ending = c.body.english + (adverb if spot == "e" else ())
    if question is not None:
        return question + auxiliary + c.subject.english + middle + ending
    opening = {"f": adverb, "c": adverb + tokens(",")}.get(spot, ())
    return opening + c.subject.english + auxiliary + middle + ending


def conjugate(verb: Verb, agreement: int, past: bool) -> str:
    """A German verb in the present or the simple past."""
    if past:
        return verb.preterite + (("n" if verb.preterite.endswith("e") else "en") if agreement == 3 else "")
    if verb.infinitive in GERMAN_PRESENT:
        return GERMAN_PRESENT[verb.infinitive].split()[agreement]
    stem = verb.present[:-1]
    first = verb.infinitive[:-1] + ("" if verb.infinitive.endswith("en") else "e")
    return (first, stem + ("t" if stem[-1] in "sßzx" else "st"), verb.present, verb.infinitive)[agreement]


def german_verb(c: Clause) -> tuple[Token, Tokens]:
    """The finite German verb and the right bracket."""
    verb, agreement = c.verb, c.subject.agreement
    if c.tense in ("simple", "progressive", "past"):
        return Token(conjugate(verb, agreement, c.tense == "past"), (c.key,)), tokens(verb.prefix, c.key)
    if c.tense == "perfect":
        forms, rest = ("sein" if "*" in verb.german_participle else "haben"), verb.german_participle.lstrip("*")
    else:
        forms, rest = ("werden" if c.tense == "future" else c.tense), verb.infinitive
    auxiliary = (GERMAN_PRESENT.get(forms) or GERMAN_MODALS[forms]).split()[agreement]
    return Token(auxiliary, (c.aux_key,)), tokens(verb.prefix + rest, c.key)


def middle_field(c: Clause, adverb: Tokens) -> Tokens:
    """The words between the finite verb and the right bracket, without the subject."""
    negator = tokens({"not": "nicht", "never": "nie"}.get(c.negation, ""), c.not_key)
    before, after = (negator, ()) if c.body.loose else ((), negator)
    return c.body.light + c.body.dative + adverb + before + c.body.manner + c.body.object + after + c.body.tail


def german(c: Clause, lead: Tokens | None = None) -> Tokens:
    """Order a German main clause with the verb second, after the lead, the adverb or the subject."""
    finite, bracket = german_verb(c)
    adverb, subject = c.adverb.german if c.adverb else (), c.subject.german("N")
    if lead is None and c.adverb and c.adverb.spot in "fc":
        lead, adverb = adverb, ()
    if lead is None:
        lead, subject = subject, ()
    return (*lead, finite, *subject, *middle_field(c, adverb), *bracket)


def german_last(c: Clause) -> Tokens:
    """Order a German subordinate clause, whose finite verb comes last."""
    finite, bracket = german_verb(c)
    if c.tense in ("simple", "progressive", "past"):
        finite, bracket = Token(c.verb.prefix + finite.text, finite.keys), ()
    return (*c.subject.german("N"), *middle_field(c, c.adverb.german if c.adverb else ()), *bracket, finite)


# ---------------------------------------------------------------------------------------------------
# Sentences.

Maker = Callable[[Dice], Sides]
MAKERS: list[tuple[Maker, str]] = []
GERMAN_COMMA: Sides = ((), (Token(","),))


def sentence(weight: int, mark: str = ".") -> Callable[[Maker], Maker]:
    """Register a maker of sentences that end in a mark; a greater weight makes it more frequent."""

    def register(maker: Maker) -> Maker:
        MAKERS.extend([(maker, mark)] * weight)
        return maker

    return register


def main(c: Clause) -> Sides:
    """A clause as a statement."""
    return english(c), german(c)


def asked(c: Clause, question: Sides = ((), ())) -> Sides:
    """A clause as a question."""
    return english(c, question[0]), german(c, question[1])


def depending(c: Clause) -> Sides:
    """A clause as a subordinate one."""
    return english(c), german_last(c)


@sentence(40)
def statement(dice: Dice) -> Sides:
    """A main clause."""
    return main(clause(dice))


@sentence(7, "?")
def yes_no_question(dice: Dice) -> Sides:
    """A question without a question word."""
    return asked(trait_clause(dice, "") if dice.chance(0.2) else clause(dice, negate=0, spots="me"))


@sentence(3, "?")
def who_question(dice: Dice) -> Sides:
    """A question for the subject."""
    left, right = align("who", "wer")
    return main(clause(dice, Phrase(left, lambda case: right), verbs=PERSONAL, negate=0, spots="me"))


@sentence(7, "?")
def object_question(dice: Dice) -> Sides:
    """A question for the object: whom, what, which or how many."""
    verb = dice.pick([v for v in PLAIN if v.frame in ("A", "D")])
    nouns = [n for n in members(verb.objects) if n.plural != "-" and n.kind != "kin"]
    if "person" in verb.objects.split():
        question = align("whom", "wem" if verb.frame == "D" else "wen")
    elif verb.frame == "A" and (dice.chance(0.4) or not nouns):
        question = align("what", "was")
    else:
        thing = noun_phrase(dice, dice.pick(nouns), "which which+ 0+ 0+")
        question = thing.english, thing.german(verb.frame)
        question = joined([align("how many", "wie viele"), question]) if thing.indefinite else question
    return asked(clause(dice, verbs=[verb], gap=True, negate=0, time=0.3, spots="me"), question)


@sentence(3, "?")
def place_question(dice: Dice) -> Sides:
    """A question for a location, a direction or an origin."""
    verb = dice.pick([v for v in PLAIN if v.frame in ("at", "to", "from")])
    question = align("where", {"at": "wo", "to": "wohin", "from": "woher"}[verb.frame])
    c = clause(dice, verbs=[verb], negate=0, time=0.4, spots="me")
    rest = tokens("from", *question[0][0].keys) if verb.frame == "from" else ()
    return asked(replace(c, body=Body(rest)), question)


@sentence(2, "?")
def time_question(dice: Dice) -> Sides:
    """A question for the time."""
    c = clause(dice, None, ("simple", "past", "future", "modal"), ACTIVE, negate=0, time=0)
    return asked(c, align("when", "wann"))


@sentence(2, "?")
def reason_question(dice: Dice) -> Sides:
    """A question for the reason."""
    return asked(clause(dice, negate=0.2, time=0.3, spots="me"), align("why", "warum"))


def being(
    dice: Dice, subject: Phrase, sides: Sides, tense: str = "simple", code: str = "", negate: float = 0
) -> Clause:
    """A clause with a form of "be" and a predicative."""
    adverb = adverbial(dice, code, "fcme") if code else None
    free = subject.indefinite or (adverb and adverb.spot in "me")
    negation = "not" if not free and dice.chance(negate) else ""
    return Clause(subject, BE, tense, Body(sides[0], tail=sides[1]), new_key(), adverb, negation, new_key())


def predicative(adjective: Adjective, degree: int = 0) -> Sides:
    """An adjective, or its comparative, after a form of "be"."""
    return align(adjective.english.split()[degree], adjective.german.split()[degree])


def trait_clause(dice: Dice, codes: str) -> Clause:
    """A description of somebody or something; only passing states take adverbials of time."""
    noun = dice.pick([n for n in NOUNS if adjectives_for(n) and n.kind != "event"])
    subject = argument(dice, "person" if noun in members("people") else noun.english, DEFINITE, describe=0)
    adjective = dice.pick(adjectives_for(subject.noun or members("man")[0]))
    if subject.agreement != 1 and dice.chance(0.25):
        return being(dice, subject, predicative(adjective), "past", negate=0.2 * bool(codes))
    code = dice.pick(codes) if codes and adjective.english.split()[0] in STATES else codes[:1]
    return being(dice, subject, predicative(adjective), "simple", code.strip(), 0.2 * bool(codes))


@sentence(7)
def trait(dice: Dice) -> Sides:
    """A statement with a predicative adjective."""
    return main(trait_clause(dice, dice.pick(("  b", "*bb"))))


@sentence(3)
def profession(dice: Dice) -> Sides:
    """A statement of a profession; German has no article there unless an adjective describes the noun."""
    subject = human(dice, "kin person")
    if subject.agreement != 2 or (subject.noun and subject.noun.kind == "job"):
        return profession(dice)
    job = dice.pick([n for n in members("job") if n.gender == subject.gender])
    adjectives = [attribute(dice.pick(adjectives_for(job)))] if dice.chance(0.5) else []
    noun = build(job, "a", extras=adjectives)
    sides = noun.english, noun.german("N")[not adjectives :]
    return main(being(dice, subject, sides, dice.pick(("simple", "past"))))


@sentence(4)
def comparison(dice: Dice) -> Sides:
    """A comparison of two things by a comparative or as equals."""
    noun = dice.pick(members("people animal things vehicle furniture place"))
    rival = dice.pick(members(noun.kind))
    shared = [a for a in adjectives_for(noun) if " " in a.english and a in adjectives_for(rival)]
    if noun == rival or not shared:
        return comparison(dice)
    adjective = dice.pick(shared)
    first, second = (noun_phrase(dice, n, "the the this", describe=0) for n in (noun, rival))
    equal = [align("as", "so"), predicative(adjective), align("as", "wie")]
    pieces = equal if dice.chance(0.4) else [predicative(adjective, 1), align("than", "als")]
    return main(being(dice, first, joined([*pieces, (second.english, second.german("N"))]), negate=0.2))


@sentence(3)
def existence(dice: Dice) -> Sides:
    """A statement that something exists at a location."""
    kind, spot = dice.pick(rows(INHABITANTS))
    thing, where = noun_phrase(dice, dice.pick(members(kind)), "a a a number+ many+ some+"), place(dice, spot, "at")
    plural, past, there = thing.agreement == 3, dice.chance(0.4), align("there", "es")
    be = align(("were" if plural else "was") if past else "are" if plural else "is", "gab" if past else "gibt")
    what = thing.english, thing.german("A")
    if dice.chance(0.4):
        return joined([where, (there[0] + be[0], be[1] + there[1]), what])
    return joined([there, be, what, where])


@sentence(3)
def price(dice: Dice) -> Sides:
    """A statement of a price."""
    subject = noun_phrase(dice, dice.pick(members("things wheels music")), "the the this")
    left, right = joined([count(dice, 1), align("euros", "Euro")])
    return main(Clause(subject, COST, dice.pick(("simple", "past")), Body(left, tail=right), new_key()))


@sentence(3)
def age(dice: Dice) -> Sides:
    """A statement of somebody's age."""
    young = dice.chance(0.2)
    subject = noun_phrase(dice, dice.pick(members("boy girl child" if young else "folk job")), "the the this")
    if not young and (dice.chance(0.5) or subject.noun in members("boy girl child")):
        subject = argument(dice, "brother sister uncle aunt friend neighbor colleague person", "the this")
    number = count(dice, 0) if young else number_words(dice.pick(ADULT))
    return main(being(dice, subject, joined([number, align("years old", "Jahre alt")])))


def with_clause(first: Clause, link: Sides, second: Clause) -> Sides:
    """A main clause followed by a subordinate clause."""
    return joined([main(first), GERMAN_COMMA, link, depending(second)])


@sentence(8)
def subordinate(dice: Dice) -> Sides:
    """A main clause and an adverbial clause, in either order."""
    conjunction, german_conjunction, era = dice.pick(rows(CONJUNCTIONS))
    tenses = {"p": THEN, "n": NOW[:1], "*": dice.pick((NOW, THEN))}[era]
    side = clause(dice, None, tenses, ACTIVE, time=0.15, negate=0.1, spots="me")
    link, verbs = align(conjunction, german_conjunction), [v for v in PLAIN if v.base != "ask"]  # "asks her if ..."
    if dice.chance(0.6):
        return with_clause(clause(dice, None, tenses, verbs, time=0.1, spots="fcm"), link, side)
    first = clause(dice, None, tenses, verbs, time=0.1, spots="m")
    return joined([link, depending(side), align(",", ","), inverted(first)])


def inverted(c: Clause) -> Sides:
    """A main clause after its adverbial clause."""
    return english(c), german(c, ())


def human(dice: Dice, classes: str = "people person") -> Phrase:
    """A person or persons to whom "he", "she" or "they" can refer."""
    while True:
        subject = argument(dice, classes, DEFINITE, describe=0.1)
        if subject.gender != "n" and not subject.objective:
            return subject


@sentence(5)
def reason(dice: Dice) -> Sides:
    """A deed, and the feelings of the same person."""
    subject, tenses = human(dice), dice.pick((NOW, THEN))
    first = clause(dice, subject, tenses, DEEDS, time=0.2, spots="fcm")
    word = "they" if subject.agreement == 3 else "she" if subject.gender == "f" else "he"
    same = pronoun(next(row for row in rows(PRONOUNS) if row[0].startswith(word + " ")))
    adjective = dice.pick([a for a in ADJECTIVES if a.english.split()[0] in STATES])
    second = being(dice, same, predicative(adjective), tenses[0], negate=0.1)
    if dice.chance(0.6):
        return with_clause(first, align("because", "weil"), second)
    return joined([main(first), align(", but", ", aber"), main(second)])


@sentence(3)
def pair_of_clauses(dice: Dice) -> Sides:
    """Two main clauses; before "und" only English has a comma."""
    tenses = dice.pick((NOW, THEN))
    first, second = (clause(dice, None, tenses, time=0.15, negate=0.1, spots="me") for _ in range(2))
    link = align(", but", ", aber") if dice.chance(0.5) else joined([(tokens(","), ()), align("and", "und")])
    return joined([main(first), link, main(second)])


@sentence(4)
def pair_of_deeds(dice: Dice) -> Sides:
    """One subject with two verbs."""
    tenses = dice.pick((NOW[:1], THEN))
    first = clause(dice, None, tenses, DEEDS, time=0.2, negate=0, spots="fc")
    others = [v for v in DEEDS if v.base != first.verb.base]
    second = clause(dice, first.subject, tenses, others, time=0, negate=0)
    left, right = main(second)
    rest = left[len(first.subject.english) :], right[len(first.subject.german("N")) :]
    return joined([main(first), align("and", "und"), rest])


@sentence(3)
def pair_of_people(dice: Dice) -> Sides:
    """Two people as one subject."""
    one, other, link = human(dice), human(dice), align("and", "und")
    if one.noun == other.noun:
        return pair_of_people(dice)
    left, right = one.english + link[0] + other.english, link[1]
    subject = Phrase(left, lambda case: one.german(case) + right + other.german(case), 3)
    return main(clause(dice, subject, verbs=PERSONAL))


@sentence(6)
def report(dice: Dice) -> Sides:
    """A report of somebody's words, thoughts, knowledge or questions."""
    tenses = dice.pick((NOW[:1], THEN))
    reports = [v for v in VERBS if v.frame in ("that", "whether")]
    first = clause(dice, None, tenses, reports, time=0.2, negate=0.2, spots="fc")
    second = clause(dice, None, THEN if tenses is THEN else TENSES, time=0.3, negate=0.1, spots="me")
    links = rows("that|dass" if first.verb.frame == "that" else "whether|ob; why|warum")
    return with_clause(first, align(*dice.pick(links)), second)


@sentence(5)
def attempt(dice: Dice) -> Sides:
    """Something that somebody tries, hopes or forgets to do."""
    attempts, tenses = [v for v in VERBS if v.frame == "inf"], ("simple", "progressive", "past", "past", "perfect")
    first = clause(dice, None, tenses, attempts, time=0.3, negate=0, spots="fcm")
    deeds = [v for v in DEEDS if v.frame not in ("-", "music") and "plain" not in v.flags]
    deed = clause(dice, first.subject, NOW[:1], deeds, time=0, negate=0)
    (to, zu), verb = align("to", "zu"), deed.verb
    infinitive = (*zu, Token(verb.infinitive, (deed.key,)))
    if verb.prefix:
        infinitive = (Token(f"{verb.prefix}zu{verb.infinitive}", (*zu[0].keys, deed.key)),)
    rest = to + tokens(verb.base, deed.key) + deed.body.english, middle_field(deed, ()) + infinitive
    return joined([main(first), GERMAN_COMMA, rest])


def relative(dice: Dice, head: Phrase, verbs: Sequence[Verb], gap: bool) -> Sides:
    """A relative clause about a noun, which is the subject or, with a gap, the object in it."""
    people, tenses = head.noun in members("people"), ("simple", "past", "perfect")
    if gap:
        c = clause(dice, None, tenses, verbs, gap=True, time=0.15, negate=0.1, spots="me")
        link = align("whom" if people else "that", cell(RELATIVES, c.verb.frame, head.gender))
        return joined([link, depending(c)])
    left, right = align("who" if people else "that", cell(RELATIVES, "N", head.gender))
    subject = replace(head, english=left, german=lambda case: right)
    return depending(clause(dice, subject, tenses, verbs, time=0.15, negate=0.1, spots="me"))


@sentence(4)
def subject_relative(dice: Dice) -> Sides:
    """A statement about somebody whom a relative clause describes."""
    head, gap = noun_phrase(dice, dice.pick(members("folk job")), "the the the+ this"), dice.chance(0.5)
    verbs = [v for v in DEEDS if not gap or (v.frame in ("A", "D") and "person" in v.objects.split())]
    left, right = relative(dice, head, verbs, gap)
    comma = tokens(",")
    whole = replace(head, english=head.english + left, german=lambda case: head.german(case) + comma + right + comma)
    return main(clause(dice, whole, verbs=PERSONAL, time=0.2, spots="me"))


@sentence(5)
def object_relative(dice: Dice) -> Sides:
    """A statement about something that a relative clause at the end describes."""
    noun = dice.pick(members("animal text things wheels music"))
    thing = noun_phrase(dice, noun, "the the the+ a")
    verbs = [v for v in PLAIN if v.frame == "A" and noun in members(v.objects)]
    unadorned = [v if v.flags == "state" else v._replace(flags="") for v in verbs if "plain" not in v.flags]
    first = clause(dice, verbs=unadorned, given=thing, negate=0, time=0.3, spots="fcm")
    second = relative(dice, thing, [v for v in verbs if v.base != first.verb.base], gap=True)
    return joined([main(first), GERMAN_COMMA, second])


def spell_english(sentence: Tokens) -> Tokens:
    """Write "an" before a vowel and "cannot" in one word."""
    result: list[Token] = []
    for token, following in zip(sentence, (*sentence[1:], Token(".")), strict=True):
        if token.text == "a" and following.text[0] in "aeiou":
            token = Token("an", token.keys)
        if token.text == "not" and result and result[-1].text == "can":
            token = Token("cannot", result.pop().keys + token.keys)
        result.append(token)
    return tuple(result)


def spell_german(sentence: Tokens) -> Tokens:
    """Contract prepositions with their articles and drop a comma before the final mark."""
    result: list[Token] = []
    for token in sentence:
        contraction = CONTRACTIONS.get(f"{result[-1].text} {token.text}") if result else None
        if contraction:
            token = Token(contraction, result.pop().keys + token.keys)
        result.append(token)
    return tuple(result[:-1] if result[-1].text == "," else result)


def write(sentence: Tokens) -> str:
    """Return the text of a sentence, with an initial capital and no space before a mark."""
    text = re.sub(r" ([.,?])", r"\1", " ".join(token.text for token in sentence))
    return text[0].upper() + text[1:]


def speak(dice: Dice, makers: Sequence[tuple[Maker, str]] = MAKERS) -> Pair:
    """Generate one sentence with its translation."""
    maker, mark = dice.pick(makers)
    left, right = maker(dice)
    final = align(mark, mark)
    source, target = spell_english(left) + final[0], spell_german(right) + final[1]
    target_positions = [(key, j) for j, token in enumerate(target) for key in token.keys]
    links = {(i, j) for i, token in enumerate(source) for key, j in target_positions if key in token.keys}
    return Pair(write(source), write(target), tuple(sorted(links)))


@functools.cache
def splits(seed: int = 1) -> dict[str, list[Pair]]:
    """Return the corpus in three parts that share no English sentence."""
    dice = Dice(seed)
    pairs: dict[str, Pair] = {}
    while len(pairs) < sum(SIZES.values()):
        pair = speak(dice)
        if len(words(pair.source)) <= LONGEST:
            pairs.setdefault(pair.source, pair)
    stream = iter(pairs.values())
    return {split: list(itertools.islice(stream, size)) for split, size in SIZES.items()}
